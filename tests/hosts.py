"""Two "hosts" on this machine: each with its own network, host name, processes, /run and sshd, as Linux namespaces.

A host is a process that waits in its namespaces until its standard input is closed: when the test ends, or dies, the
kernel ends everything that ever ran on the host, and its network goes with it. Nothing is left on the machine, and
nothing that is started on a host (``pkill`` in DeepSpeed's clean-up, say) can reach a process outside it. The file
system is shared, as on a cluster, apart from what is mounted below.

    host-a 10.77.0.2 --- veth --- 10.77.0.3 host-b        10.77.0.9 host-gone: a name that nobody answers for
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ADDRESSES = {"host-a": "10.77.0.2", "host-b": "10.77.0.3"}
GONE = "host-gone"
SLURM_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_SETUP = """
set -e
hostname "$NAME"
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
mkdir -m 1777 /run/tmp
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/ssh_config" /etc/ssh/ssh_config
ip link set lo up
echo ready
read -r _
ip link set eth0 up
ip addr add "$ADDRESS/24" dev eth0
/usr/sbin/sshd -f "$FOLDER/sshd_config" -E "$FOLDER/sshd-$NAME.log" < /dev/null
echo ready
read -r _ || true
"""


def which(program: str) -> str | None:
    return shutil.which(program, path=PATH)


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "two hosts need root (network namespaces)"
    programs = [p for p in ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "sshd", "hostname") if not which(p)]
    if programs:
        return f"two hosts need {', '.join(programs)} (Debian: iproute2, openssh-server, util-linux, hostname)"
    probe = subprocess.run(["unshare", "--net", "--uts", "--pid", "--ipc", "--mount", "--fork", "ip", "link", "add",
                            "eth0", "type", "veth", "peer", "name", "eth1"], capture_output=True, text=True)
    return f"two hosts need network namespaces: {probe.stderr.strip()}" if probe.returncode else None


@dataclass
class Host:
    name: str
    keeper: subprocess.Popen[str]
    daemons: set[int] = field(default_factory=set)
    """Processes that belong to the host, not to a test."""

    def __post_init__(self) -> None:
        self.next_stage()
        children = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split()
        self.pid = int(children[0])  # of the host's first process, as this machine counts

    def next_stage(self, word: str = "") -> None:
        assert self.keeper.stdin is not None and self.keeper.stdout is not None
        self.keeper.stdin.write(word)
        self.keeper.stdin.flush()
        if self.keeper.stdout.readline() != "ready\n":
            raise RuntimeError("a host could not be set up; its error is above")

    def command(self, argv: Sequence[str], cwd: Path | str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--ipc", "--pid", "--mount", f"--wd={cwd}",
                *argv]

    def start(self, argv: Sequence[str], cwd: Path | str, env: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
        """Start a program on the host. Its output goes to a file, so that no pipe keeps a test waiting."""
        with output.open("wb") as file:
            return subprocess.Popen(self.command(argv, cwd), env={**env, "TMPDIR": "/run/tmp"}, stdout=file,
                                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def run(self, argv: Sequence[str], cwd: Path | str = "/", timeout: float = 30) -> str:
        return subprocess.run(self.command(argv, cwd), check=True, stdout=subprocess.PIPE, text=True, timeout=timeout,
                              stdin=subprocess.DEVNULL).stdout

    def processes(self) -> dict[int, str]:
        """What runs on the host beside itself, its sshd and daemons: pid on this machine -> command line."""
        here = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for pid in {int(entry) for entry in os.listdir("/proc") if entry.isdigit()} - {self.pid, *self.daemons}:
            try:
                if os.readlink(f"/proc/{pid}/ns/pid") == here:
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    if line and not line.startswith("sshd:"):  # no command line: a zombie, about to be collected
                        found[pid] = line
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # ended while we looked, or not ours
        return found

    def wait_until_idle(self, seconds: float) -> dict[int, str]:
        """What is still running after so many seconds: nothing, it is hoped."""
        deadline = time.monotonic() + seconds
        while (running := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return running


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """host-a and host-b, that can log in to each other. ``folder``: for keys (made here, of use to nobody else), logs.
    """
    _write_ssh_files(folder)
    hosts: list[Host] = []
    try:
        for name, address in ADDRESSES.items():
            hosts.append(Host(name, subprocess.Popen(
                ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc",
                 "bash", "-c", _SETUP], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={"NAME": name, "ADDRESS": address, "FOLDER": str(folder), "PATH": PATH})))
        # The peer's pid is that of this machine: only the network namespace is entered.
        subprocess.run(["nsenter", "--target", str(hosts[0].pid), "--net", "ip", "link", "add", "eth0", "type", "veth",
                        "peer", "name", "eth0", "netns", str(hosts[1].pid)], check=True)
        for host in hosts:
            host.next_stage("go on\n")
        for host in hosts:
            for name in ADDRESSES:  # an sshd may not listen yet
                assert host.run(["ssh", "-o", "ConnectionAttempts=20", name, "hostname"]).strip() == name
        yield hosts
    finally:
        for host in hosts:
            assert host.keeper.stdin is not None
            host.keeper.stdin.close()  # the host's first process ends, the kernel ends the others
            try:
                host.keeper.wait(10)
            except subprocess.TimeoutExpired:
                os.kill(host.pid, signal.SIGKILL)
                host.keeper.wait(10)


def _write_ssh_files(folder: Path) -> None:
    for key in "host_key", "login_key":
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
        f"{address} {name}\n" for name, address in [*ADDRESSES.items(), (GONE, "10.77.0.9")]))
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/login_key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/login_key.pub\nPermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\nStrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
        "SetEnv TMPDIR=/run/tmp\n")


_SLURM_CONF = """
ClusterName=test
SlurmctldHost=host-a
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%h.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A requeued job waits until the credential of its first run has expired: 120 s by default.
AuthInfo=cred_expire=5
KillWait=5
NodeName={nodes} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def start_slurm(hosts: list[Host], folder: Path) -> None:
    """A real Slurm: munged on both, slurmctld on host-a, slurmd on both. The daemons end with the hosts.

    Raises:
        RuntimeError: the nodes do not become idle.
    """
    for name in "state", "etc":
        (folder / name).mkdir()
    (folder / "etc" / "slurm.conf").write_text(_SLURM_CONF.format(folder=folder, nodes=",".join(ADDRESSES)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    for host in hosts:
        host.run(["mkdir", "-p", "/run/munge", "/run/slurmd"])
        host.run(["mount", "--bind", str(folder / "etc"), "/etc/slurm"])
        host.run([str(which("munged")), "--force", f"--key-file={key}", "--pid-file=/run/munge/munged.pid",
                  "--seed-file=/run/munge/seed", f"--log-file={folder}/munged-{host.name}.log"])
    for host, daemon in (hosts[0], "slurmctld"), (hosts[0], "slurmd"), (hosts[1], "slurmd"):
        host.run([str(which(daemon))])
    deadline = time.monotonic() + 60
    while hosts[0].run(["sinfo", "--noheader", "--partition=low", "--format=%D %t"]).strip() != "2 idle":
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))
            raise RuntimeError(f"Slurm's nodes are not idle:\n{logs}")
        time.sleep(0.5)
    for host in hosts:
        host.daemons.update(host.processes())
