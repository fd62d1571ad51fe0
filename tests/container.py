"""Run the steps of launch/Dockerfile where there is no container engine: in a fresh Debian, by chroot.

    python tests/container.py DIR       as root, with debootstrap; ten minutes and 4 GB

The last step is a check: the installed ds_looksam imports, and DeepSpeed knows LookSAM.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = ("python -c 'import ds_looksam, mpi4py.MPI as mpi; assert ds_looksam.is_registered(); "
         "print(mpi.Get_library_version())'; bash launch/torchrun.sh --slots 1 --dry-run; "
         "for program in ssh pdsh mpirun numactl hostname; do command -v $program; done; test -x /usr/sbin/sshd")
STEPS = {"ARG": ":", "FROM": ":", "SHELL": ":", "CMD": ":", "ENV": "export {}", "WORKDIR": "mkdir -p {0}; cd {0}",
         "COPY": "tar xf /repository.tar", "RUN": "bash -eo pipefail -c {1}"}
"""What stands for each instruction, with its text and that quoted. Another one is a KeyError: teach it to this file."""


def main(image: Path) -> None:
    steps = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "launch" / "Dockerfile").read_text())  # first comments, then \ at ends
    instructions = re.findall(r"(?m)^(\S+) (.*)", re.sub(r"\\\n\s*", " ", steps))
    release = dict(instructions)["ARG"].removeprefix("BASE=debian:").split("-")[0]
    if not (image / "bin").exists():
        subprocess.run(["debootstrap", "--variant=minbase", release, image], check=True)
    subprocess.run(["git", "archive", f"--output={image}/repository.tar", "HEAD"], cwd=ROOT, check=True)
    # How this machine reaches packages: its certificates, pip's settings and wheels.
    environment = {name: value for name, value in os.environ.items()
                   if name.startswith("PIP_") or "proxy" in name.lower()}
    environment |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    if Path(wheels := os.environ.get("PIP_FIND_LINKS", "")).is_absolute() and Path(wheels).is_dir():
        shutil.copytree(wheels, image / wheels.lstrip("/"), dirs_exist_ok=True)
    if certificates := os.environ.get("PIP_CERT"):
        shutil.copy(certificates, image / "certificates.pem")
        environment |= {"PIP_CERT": "/certificates.pem", "SSL_CERT_FILE": "/certificates.pem"}
    script = "\n".join(STEPS[word].format(rest, shlex.quote(rest)) for word, rest in [*instructions, ("RUN", CHECK)])
    enter = 'mount -t proc proc "$1/proc"; exec chroot "$1" bash -exc "$2"'
    subprocess.run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-ec", enter, "-", image, script],
                   check=True, env=environment)
    print("all steps ran")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
