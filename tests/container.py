"""Run the steps of launch/Dockerfile where there is no container engine: in a fresh Debian, by chroot.

    python tests/container.py DIR       as root, with debootstrap; ten minutes and 4 GB

The last step is a check: the installed ds_looksam imports, and DeepSpeed knows LookSAM.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = ("python -c 'import ds_looksam, mpi4py.MPI as mpi; assert ds_looksam.is_registered(); "
         "print(mpi.Get_library_version())'; bash launch/torchrun.sh --slots 1 --dry-run; "
         "for program in ssh pdsh mpirun numactl hostname; do command -v $program; done; test -x /usr/sbin/sshd")
ENTER = """
mount -t proc proc "$1/proc"
exec chroot "$1" bash -eo pipefail -c 'cd "$1"; eval "$2"' - "$2" "$3"
"""


def main(image: Path) -> None:
    steps = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "launch" / "Dockerfile").read_text())  # first comments, then \ at ends
    instructions = re.findall(r"(?m)^([A-Z]+) (.*)", re.sub(r"\\\n\s*", " ", steps))
    release = dict(instructions)["ARG"].removeprefix("BASE=debian:").split("-")[0]
    if not (image / "bin").exists():
        subprocess.run(["debootstrap", "--variant=minbase", release, image], check=True)
    # How this machine reaches packages: its certificates, pip's settings and wheels.
    environment = {name: value for name, value in os.environ.items()
                   if name.startswith("PIP_") or "proxy" in name.lower()}
    environment |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    if Path(wheels := os.environ.get("PIP_FIND_LINKS", "")).is_absolute() and Path(wheels).is_dir():
        shutil.copytree(wheels, image / wheels.lstrip("/"), dirs_exist_ok=True)
    if certificates := os.environ.get("PIP_CERT"):
        shutil.copy(certificates, image / "certificates.pem")
        environment |= {"PIP_CERT": "/certificates.pem", "SSL_CERT_FILE": "/certificates.pem"}
    folder = "/"
    for word, rest in [*instructions, ("RUN", CHECK)]:
        print(f"--- {word} {rest}", flush=True)
        if word == "ENV":
            for name, value in re.findall(r"(\w+)=(\S+)", rest):
                environment[name] = value.replace("$PATH", environment["PATH"])
        elif word == "WORKDIR":
            folder = rest
            (image / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
            subprocess.run(["tar", "x", "-C", image / folder.lstrip("/")], input=archive, check=True)
        elif word == "RUN":
            subprocess.run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-ec", ENTER, "-", image,
                            folder, rest], check=True, env=environment)
        elif word not in ("ARG", "FROM", "SHELL", "CMD"):
            sys.exit(f"{word} is not known here: teach it to {__file__}")
    print("all steps ran")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
