"""Every launcher, for real: 4 ranks on 2 hosts end with the oracle's weights; and what goes wrong is said, in time.

Needs root and network namespaces, and says what it lacks. Continuous integration runs what is not marked; all of it:

    bash tests/mpi.sh; pytest -m "hosts or not hosts" tests/test_launchers.py
"""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ds_looksam
from tests import hosts
from tests.hosts import Host
from tests.test_train import MODEL, data, options, weights  # noqa: F401
from tests.training import Case, distance, run_oracle

ROOT = Path(__file__).parent.parent
CASE = Case(model="mlp", world=4, stage=2, accumulation=2, clipping=0.5, updates=7)
TOLERANCE = 1e-5
"""fp32 against float64 over 7 updates of a small model, as in the oracle grid."""
RUN_SECONDS = 600
"""Four Pythons that import torch and DeepSpeed on two cores: half a minute on an idle machine. A hang, not a delay."""
SOON = 60.0
"""To find out what is wrong before anything is started, a host has 10 s to answer. After the death of a rank, which
launchers look for every second, what is left gets 5 s to end politely. The rest is for a slow machine."""
AFTERMATH = 15.0
"""Seconds after a launch script has ended in which everything it started must be gone. It ends what is left itself."""

pytestmark = pytest.mark.timeout(2 * RUN_SECONDS)


@dataclass
class Launch:
    """A launch script that was started on a host, and what came of it."""

    job: Job
    log: Path
    process: subprocess.Popen[bytes] | None

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-20_000:] if self.log.exists() else ""

    def exit_code(self) -> int | None:
        """None: it is running."""
        return self.process.poll()

    def kill(self, number: signal.Signals) -> None:
        """A signal to the script itself, which runs below nsenter."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)

    def wait_for(self, files: str, count: int = 1) -> None:
        """Ranks have got as far as to write them."""
        deadline = time.monotonic() + RUN_SECONDS
        while len(list(self.job.folder.glob(files))) < count:
            assert self.exit_code() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.2)

    def ends(self, expected: int | None, *words: str, within: float = RUN_SECONDS) -> None:
        """By itself and in time, with this exit code (None: any but 0). It says ``words`` and leaves nothing behind."""
        deadline = time.monotonic() + within
        while (code := self.exit_code()) is None:
            assert time.monotonic() < deadline, f"running: {self.job.running()}\n{self.output()}"
            time.sleep(0.2)
        assert code == expected if expected is not None else code != 0, f"exit code {code}\n{self.output()}"
        for word in words:
            assert word in self.output(), f"no {word!r} in\n{self.output()}"
        left = self.job.running(AFTERMATH)
        assert not any(left), f"still running: {left}\n{self.output()}"


@dataclass
class SlurmJob(Launch):
    """launch/slurm.sbatch in the queue; there is no ``process``."""

    number: str

    def facts(self) -> dict[str, str]:
        fields = self.job.hosts[0].run(["scontrol", "--oneliner", "show", "job", self.number]).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def exit_code(self) -> int | None:
        facts = self.facts()
        ended = facts["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        return int((facts["JobState"], facts["ExitCode"]) != ("COMPLETED", "0:0")) if ended else None


@dataclass
class Job:
    """One tiny training run, to be launched in some way."""

    folder: Path
    hosts: list[Host]
    python: str = sys.executable

    def __post_init__(self) -> None:
        (self.folder / "case.pickle").write_bytes(pickle.dumps(CASE))
        self.write_hostfile(*hosts.ADDRESSES)
        self.variables = [f"{name}={value}" for name, value in {
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "FROM_DEEPSPEED_ENV": "yes",
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR")}.items() if value]
        (self.folder / ".deepspeed_env").write_text("\n".join(["# what every rank gets", "", *self.variables, ""]))

    def write_hostfile(self, *names: str) -> None:
        (self.folder / "hosts").write_text("# two hosts\n" + "".join(f"{name} slots=2\n" for name in names))

    @property
    def environment(self) -> dict[str, str]:
        """A user's shell: none of pytest's own variables."""
        return {"PATH": f"{Path(self.python).parent}:{os.environ['PATH']}:/usr/sbin", "HOME": os.environ["HOME"],
                "DS_ACCELERATOR": "cpu", "PYTHON": self.python, "LANG": "C.UTF-8"}

    def start(self, command: str, *arguments: str, on: int = 0) -> Launch:
        """A script of launch/, with the arguments in ``command`` and those beside."""
        script, *more = shlex.split(command)
        argv = ["bash", str(ROOT / "launch" / script), "--hostfile", "hosts", *more, *arguments]
        log = self.folder / f"output-{on}"
        return Launch(self, log, self.hosts[on].start(argv, self.folder, self.environment, log))

    def train(self, command: str, program: str = "", on: int = 0) -> Launch:
        """With the tiny program, which is told ``program`` beside."""
        return self.start(command, *self.tiny(program), on=on)

    def tiny(self, program: str) -> list[str]:
        return ["--program", str(ROOT / "tests" / "launched.py"), "--", "--case", str(self.folder / "case.pickle"),
                "--out", str(self.folder), "--checkpoints", str(self.folder / "checkpoints"), *program.split()]

    def submit(self, program: str) -> SlurmJob:
        log = self.folder / "slurm.out"
        environment = [f"{name}={value}" for name, value in self.environment.items()]
        number = self.hosts[0].run([
            "env", *environment, "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", f"--output={log}",
            "launch/slurm.sbatch", *(word for line in self.variables for word in ("--env", line)),
            *self.tiny(program)], cwd=ROOT)
        return SlurmJob(self, log, None, number.strip())

    def running(self, seconds: float = 0.0) -> list[dict[int, str]]:
        """What still runs on each host, after at most so many seconds."""
        return [host.wait_until_idle(seconds) for host in self.hosts]

    def check_weights(self, started_at: list[int], bound: bool = False) -> None:
        """The ranks were started at these updates. Each holds the oracle's weights, ran where it should, and had the
        variable from .deepspeed_env. ``bound``: with a core each on a host; both hosts are this machine, with two."""
        assert sorted(int(p.name.split("-")[2]) for p in self.folder.glob("started-at-*-rank-0")) == started_at
        _, expected = run_oracle(CASE)
        ranks = [torch.load(self.folder / f"rank-{rank}.pt") for rank in range(CASE.world)]
        for rank, got in enumerate(ranks):
            assert (got["host"], got["local_rank"]) == (list(hosts.ADDRESSES)[rank // 2], str(rank % 2))
            assert got["variable"] == "yes"
            assert distance(got["weights"], expected) < TOLERANCE
        if bound:
            cores = [got["cores"] for got in ranks]
            assert all(len(own) == 1 for own in cores) and cores[0] != cores[1] and cores[2] != cores[3], cores


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory) -> Iterator[list[Host]]:
    if problem := hosts.missing():
        pytest.skip(problem)
    with hosts.two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair


@pytest.fixture
def job(tmp_path, two_hosts) -> Iterator[Job]:
    job = Job(tmp_path, two_hosts)
    yield job
    for left in job.running():  # of a test that failed: the next one must not see its processes
        for pid in left:
            subprocess.run(["kill", "-9", str(pid)], check=False, stderr=subprocess.DEVNULL)


def needs(packages: str, *programs: str) -> pytest.MarkDecorator:
    absent = ", ".join(p for p in programs if not hosts.which(p))
    return pytest.mark.skipif(bool(absent), reason=f"needs {absent} (Debian: apt-get install {packages})")


def mpi_python(kind: str) -> str:
    """An interpreter that sees this one's packages, with mpi4py and that MPI beside it.

    Both MPIs bring an ``mpirun``, so each gets an environment of its own, made once: LOOKSAM_MPI or ~/.cache.
    """
    folder = Path(os.environ.get("LOOKSAM_MPI", Path.home() / ".cache" / "ds_looksam-mpi")) / kind
    if not (folder / "bin" / "mpirun").exists():
        pytest.skip(f"no {kind} in {folder}; make one with: bash tests/mpi.sh")
    here = next(p for p in sys.path if p.endswith("site-packages"))
    next(folder.glob("lib/python*/site-packages")).joinpath("packages-of-the-tests.pth").write_text(f"{here}\n")
    return str(folder / "bin" / "python")


HOSTS = pytest.mark.hosts
PDSH = [HOSTS, needs("pdsh", "pdsh")]
ENDED = "error: the job ended with exit code"


@pytest.mark.parametrize(("killed", "goes_on"), [
    ("torchrun.sh", "ssh.sh"),
    pytest.param("ssh.sh", "torchrun.sh", marks=HOSTS),
    pytest.param("pdsh.sh", "pdsh.sh", marks=PDSH),
    *[pytest.param(f"{mpi}.sh", f"{mpi}.sh {how}", marks=HOSTS) for mpi, how in [
        ("openmpi", "--bind 1"), ("openmpi", "--deepspeed --launcher-args '--map-by :OVERSUBSCRIBE'"),
        ("mpich", "--bind 1"), ("mpich", "--deepspeed")]],
])
def test_a_job_whose_rank_was_killed_goes_on(job, killed, goes_on):
    """The last rank, on the other host. The others are asleep, as in a collective that waits for its time-out: nothing
    but the script can end them (mpirun does it by itself). Another script goes on from the checkpoint."""
    words = [ENDED]
    if "mpi" in killed:
        job.python = mpi_python(killed.removesuffix(".sh"))
    else:
        words += ["ending what is left of looksam-"]
    launch = job.train(killed, "--die-at 2 --hang")
    launch.wait_for("died")
    launch.ends(None, *words, within=SOON)
    job.train(goes_on).ends(0)
    job.check_weights(started_at=[0, 2], bound="--bind" in goes_on)


@pytest.mark.parametrize("script", ["ssh.sh", "torchrun.sh", pytest.param("pdsh.sh", marks=PDSH)])
def test_what_is_wrong_with_hosts_is_said_before_anything_is_started(job, script):
    """The first has an sshd on the port, the second does not answer."""
    job.write_hostfile("host-a", hosts.GONE)
    job.train(f"{script} --master-port 22").ends(
        2, "error: host-a: port 22 cannot be used (Address already in use)", "--master-port", f"error: {hosts.GONE}: ",
        "nothing was started", within=SOON)


@HOSTS
def test_no_ssh(job):
    """A script cannot look at the other host: the rendezvous gives up after DEEPSPEED_TIMEOUT minutes."""
    job.train("no_ssh.sh --node-rank 0 --env DEEPSPEED_TIMEOUT=1").ends(None, "2/4 clients joined")
    bind = "--bind" if hosts.which("numactl") else ""
    second = job.train(f"no_ssh.sh --node-rank 1 {bind}", on=1)
    job.train(f"no_ssh.sh --node-rank 0 {bind}").ends(0)
    second.ends(0)
    job.check_weights(started_at=[0], bound=bool(bind))


@pytest.mark.parametrize("script", [
    pytest.param("ssh.sh", marks=HOSTS), pytest.param("torchrun.sh --restarts 1", marks=HOSTS),
    pytest.param("pdsh.sh", marks=PDSH)])
def test_a_job_that_is_told_to_stop_saves_and_goes_on(job, script):
    launch = job.train(script, "--wait-at 4")
    launch.wait_for("waiting-at-4-rank-*", 4)
    launch.kill(signal.SIGTERM)
    launch.ends(75, "the job has saved a checkpoint and can be started again", within=SOON)
    job.train(script).ends(0)
    job.check_weights(started_at=[0, 4])


@HOSTS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_script_that_is_told_to_stop_takes_everything_with_it(job, number):
    """What a killed one leaves can be ended by the job's name."""
    launch = job.train("ssh.sh", "--die-at 0 --hang --nobody-dies")
    launch.wait_for("hanging")
    launch.kill(number)
    if number == signal.SIGTERM:
        launch.ends(143, "TERM: telling the ranks to stop", within=SOON)
    else:
        launch.process.wait(AFTERMATH)
        assert all(job.running())
        name = launch.output().split("LOOKSAM_JOB=")[1].split()[0]
        job.start("stop.sh", "--", name).ends(0, within=SOON)


@HOSTS
def test_hosts_with_different_versions_are_named(job, tmp_path):
    """host-b has another ds_looksam where host-a has this one."""
    package, other = Path(ds_looksam.__file__).parent, tmp_path / "ds_looksam"
    shutil.copytree(package, other)
    versions = other / "ranks" / "versions.py"
    versions.write_text(versions.read_text().replace("__version__ = ", "__version__ = '9.9.9' or "))
    job.hosts[1].run(["mount", "--bind", str(other), str(package)])
    try:
        job.train("ssh.sh").ends(None, "LookSAMVersionError", "ds_looksam 9.9.9", "on ranks 2-3 (host-b)")
    finally:
        job.hosts[1].run(["umount", str(package)])


@HOSTS
def test_train_py_goes_on_after_a_rank_was_killed(job, data):  # noqa: F811
    """The default program, by two launchers: a run whose last rank is killed after an epoch is the run that was not."""
    def arguments(run: str) -> list[str]:
        return ["--env", f"PYTHONPATH={ROOT}", "--", "--model", MODEL,
                *options(data, job.folder / run, "looksam_zero2", epochs=6)]

    job.start("ssh.sh", *arguments("whole")).ends(0)
    launch = job.start("torchrun.sh --restarts 1", *arguments("killed"), "--resume")
    launch.wait_for("killed/checkpoints/latest")
    os.kill(max(pid for pid, line in job.hosts[1].processes().items()
                if "launch/train.py" in line and "torch.distributed.run" not in line), signal.SIGKILL)
    launch.ends(0)
    assert "Signal 9 (SIGKILL)" in launch.output() or "exitcode: -9" in launch.output(), launch.output()
    updates = int(max((job.folder / "whole" / "checkpoints").glob("update-*")).name.removeprefix("update-"))
    whole, killed = weights(job.folder / "whole", updates), weights(job.folder / "killed", updates)
    # The same sums in the same order: nothing rounds differently.
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@HOSTS
@needs("slurm-wlm munge", *hosts.SLURM_PROGRAMS)
def test_slurm(job, tmp_path_factory):
    """srun, one task a slot. A rank dies; then the signal that announces the end of the time puts the job back into the
    queue, and a job of a better partition does."""
    hosts.start_slurm(job.hosts, tmp_path_factory.mktemp("slurm"))
    killed = job.submit("--die-at 2 --hang")
    killed.wait_for("died")
    killed.ends(None, "host-b: task 3: Exited with exit code 137", ENDED, within=SOON)  # 128 + SIGKILL
    assert killed.facts()["Restarts"] == "0"
    goes_on = job.submit("--wait-at 3 5")
    goes_on.wait_for("waiting-at-3-rank-*", 4)
    job.hosts[0].run(["scancel", "--signal=USR1", goes_on.number])
    goes_on.wait_for("waiting-at-5-rank-*", 4)
    assert goes_on.facts()["Restarts"] == "1"
    job.hosts[0].run(["sbatch", "--wait", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1",
                      "--output=/dev/null"], cwd=ROOT, timeout=RUN_SECONDS)
    goes_on.ends(0)
    assert goes_on.facts()["Restarts"] == "2"
    job.check_weights(started_at=[0, 2, 3, 5])
