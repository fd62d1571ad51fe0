"""A real Slurm on the two hosts: munged on both, slurmctld and slurmd on host-a, slurmd on host-b."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .hosts import ADDRESSES, Host, which

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")

_CONF = """
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


def start(hosts: list[Host], folder: Path) -> None:
    """Start the daemons; they end with the hosts. Raises RuntimeError if the nodes do not become idle."""
    for name in "state", "etc":
        (folder / name).mkdir()
    (folder / "etc" / "slurm.conf").write_text(_CONF.format(folder=folder, nodes=",".join(ADDRESSES)))
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
