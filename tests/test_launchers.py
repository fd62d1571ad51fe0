"""Every launcher, for real: 4 ranks on 2 hosts end with the oracle's weights; and what goes wrong is said, in time.

Needs root and network namespaces, and says what it lacks. Continuous integration runs what is not marked; all of it:

    bash tests/mpi.sh; pytest -m "hosts or not hosts" tests/test_launchers.py
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ds_looksam
from tests import hosts, slurm
from tests.hosts import Host
from tests.test_train import MODEL, data, options, weights  # noqa: F401
from tests.training import Case, distance, run_oracle

ROOT = Path(__file__).parent.parent
HOST_NAMES = list(hosts.ADDRESSES)
CASE = Case(model="mlp", world=4, stage=2, accumulation=2, clipping=0.5, updates=7)
TOLERANCE = 1e-5
"""fp32 against float64 over 7 updates of a small model, as in the oracle grid."""
RUN_SECONDS = 600
"""Four Pythons that import torch and DeepSpeed on two cores: half a minute on an idle machine. A hang, not a delay."""
REFUSAL_SECONDS = 60.0
"""What a script finds out before it starts anything: at most the 10 s that a host has to answer, and a slow machine."""
DEATH_SECONDS = 60.0
"""From the death of a rank to the end of the script: launchers look at their ranks every second, what is left gets 5 s
to end politely; the rest is for a slow machine."""
AFTERMATH = 15.0
"""Seconds after a launch script has ended in which everything it started must be gone. It ends what is left itself."""


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory) -> Iterator[list[Host]]:
    if problem := hosts.missing():
        pytest.skip(problem)
    with hosts.two_hosts(tmp_path_factory.mktemp("hosts"), {}) as pair:
        yield pair


@dataclass
class Launch:
    """A launch script started on a host, and what came of it."""

    host: Host
    process: subprocess.Popen[bytes]
    log: Path
    everyone: list[Host]

    def finish(self, seconds: float = RUN_SECONDS) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s; running: {self.running()}\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-20_000:]

    def running(self) -> dict[str, dict[int, str]]:
        return {host.name: host.processes() for host in self.everyone}

    def nothing_is_left(self) -> None:
        for host in self.everyone:
            left = host.wait_until_idle(AFTERMATH)
            assert not left, f"still running on {host.name}: {left}\n{self.output()}"

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """A signal to the script itself, which runs below nsenter."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)

    def succeeds(self) -> None:
        code = self.finish()
        assert code == 0, f"exit code {code}\n{self.output()}"
        self.nothing_is_left()

    def fails(self, seconds: float, *words: str) -> int:
        """It ends by itself in time, not with 0, says all of ``words``, and leaves nothing behind."""
        code = self.finish(seconds)
        assert code != 0, self.output()
        for word in words:
            assert word in self.output(), f"no {word!r} in\n{self.output()}"
        self.nothing_is_left()
        return code


@dataclass
class Job:
    """One tiny training run, to be launched in some way."""

    folder: Path
    hosts: list[Host]
    case: Case = CASE
    python: str = sys.executable
    kind: str = ""

    def __post_init__(self) -> None:
        (self.folder / "case.pickle").write_bytes(pickle.dumps(self.case))
        self.write_hostfile(*HOST_NAMES)
        variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "FROM_DEEPSPEED_ENV": "yes", **{
            name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR", ) if name in os.environ}}
        (self.folder / ".deepspeed_env").write_text(
            "# what every rank gets\n\n" + "".join(f"{name}={value}\n" for name, value in variables.items()))

    def write_hostfile(self, *names: str) -> None:
        (self.folder / "hosts").write_text("# two hosts\n" + "".join(f"{name} slots=2\n" for name in names))

    @property
    def environment(self) -> dict[str, str]:
        """A user's shell: none of pytest's own variables."""
        return {"PATH": f"{Path(self.python).parent}:{os.environ['PATH']}:/usr/sbin", "HOME": os.environ["HOME"],
                "DS_ACCELERATOR": "cpu", "PYTHON": self.python, "LANG": "C.UTF-8"}

    def start(self, script: str, *arguments: str, on: int = 0, program: tuple[str, ...] = ()) -> Launch:
        """With the tiny program, which is told ``program`` beside."""
        return self.start_script(script, *arguments, "--program", str(ROOT / "tests" / "launched.py"), "--", "--case",
                                 str(self.folder / "case.pickle"), "--out", str(self.folder), *program, on=on)

    def start_script(self, script: str, *arguments: str, on: int = 0) -> Launch:
        log = self.folder / f"output-{on}"
        argv = ["bash", str(ROOT / "launch" / script), *arguments]
        return Launch(self.hosts[on], self.hosts[on].start(argv, self.folder, self.environment, log), log, self.hosts)

    def starts(self) -> list[int]:
        """The updates that the ranks started at, each time they were started."""
        return sorted(int(p.name.split("-")[2]) for p in self.folder.glob("started-at-*-rank-0"))

    def check_binding(self) -> None:
        """The ranks of a host have a core each. Both hosts are the same machine, with two."""
        cores = [torch.load(self.folder / f"rank-{rank}.pt")["cores"] for rank in range(4)]
        assert all(len(own) == 1 for own in cores) and cores[0] != cores[1] and cores[2] != cores[3], cores

    def check_weights(self, local_ranks: str = "0101") -> None:
        """Every rank holds the oracle's weights, ran where it should, and had the variable from .deepspeed_env."""
        _, expected = run_oracle(self.case)
        for rank in range(self.case.world):
            got = torch.load(self.folder / f"rank-{rank}.pt")
            assert (got["host"], got["local_rank"]) == (HOST_NAMES[rank // 2], local_ranks[rank])
            assert got["variable"] == "yes"
            assert distance(got["weights"], expected) < TOLERANCE


@pytest.fixture
def job(tmp_path, two_hosts) -> Iterator[Job]:
    yield Job(tmp_path, two_hosts)
    for host in two_hosts:  # of a test that failed: the next one must not see its processes
        for pid in host.processes():
            subprocess.run(["kill", "-9", str(pid)], check=False, stderr=subprocess.DEVNULL)


def needs(*programs: str) -> pytest.MarkDecorator:
    absent = ", ".join(p for p in programs if not hosts.which(p))
    return pytest.mark.skipif(bool(absent), reason=f"needs {absent} (Debian: apt-get install {absent})")


pytestmark = pytest.mark.timeout(2 * RUN_SECONDS)


@pytest.mark.hosts
@needs("pdsh")
def test_pdsh(job):
    job.start("pdsh.sh", "--hostfile", "hosts").succeeds()
    job.check_weights()


def test_ssh(job):
    job.start("ssh.sh", "--hostfile", "hosts").succeeds()
    job.check_weights()


@pytest.mark.hosts
@pytest.mark.parametrize("bind", [[], pytest.param(["--bind"], marks=needs("numactl"))], ids=["", "bind"])
def test_no_ssh(job, bind):
    second = job.start("no_ssh.sh", "--hostfile", "hosts", "--node-rank", "1", *bind, on=1)
    job.start("no_ssh.sh", "--hostfile", "hosts", "--node-rank", "0", *bind).succeeds()
    second.succeeds()
    job.check_weights()
    if bind:
        job.check_binding()


@pytest.mark.hosts
def test_torchrun_rendezvous(job):
    job.start("torchrun.sh", "--hostfile", "hosts").succeeds()
    job.check_weights()


@pytest.mark.hosts
def test_torchrun_starts_killed_ranks_again_from_the_checkpoint(job):
    launch = job.start("torchrun.sh", "--hostfile", "hosts", "--restarts", "1",
                       program=("--die-at", "4", "--checkpoints", str(job.folder / "checkpoints")))
    launch.succeeds()
    assert (job.folder / "died").exists()
    assert job.starts() == [0, 4]
    job.check_weights()


@pytest.mark.hosts
def test_train_py_goes_on_after_a_rank_was_killed(job, data):  # noqa: F811
    """The default program, by two launchers: a run whose last rank is killed after an epoch is the run that was not."""
    def arguments(run: str) -> list[str]:
        return ["--hostfile", "hosts", "--env", f"PYTHONPATH={ROOT}", "--", "--model", MODEL,
                *options(data, job.folder / run, "looksam_zero2", epochs=6)]

    job.start_script("ssh.sh", *arguments("whole")).succeeds()
    launch = job.start_script("torchrun.sh", "--restarts", "1", *arguments("killed"), "--resume")
    wait_for(job.folder / "killed" / "checkpoints" / "latest", launch)
    ranks = [pid for pid, line in job.hosts[1].processes().items()
             if "launch/train.py" in line and "torch.distributed.run" not in line]
    os.kill(max(ranks), signal.SIGKILL)
    launch.succeeds()
    assert "Signal 9 (SIGKILL)" in launch.output() or "exitcode: -9" in launch.output(), launch.output()
    updates = int(max((job.folder / "whole" / "checkpoints").glob("update-*")).name.removeprefix("update-"))
    whole, killed = weights(job.folder / "whole", updates), weights(job.folder / "killed", updates)
    # The same sums in the same order: nothing rounds differently.
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.fixture(params=["openmpi", "mpich"])
def mpi_job(request, job, tmp_path_factory) -> Job:
    python = mpi_python(request.param)
    if isinstance(python, str):
        pytest.skip(python)
    job.python = str(python)
    job.kind = request.param
    return job


def mpi_python(kind: str) -> Path | str:
    """An interpreter that sees this one's packages, with mpi4py and that MPI beside it; or why there is none.

    Both MPIs bring an ``mpirun``, so each gets an environment of its own, made once: LOOKSAM_MPI or ~/.cache.
    """
    folder = Path(os.environ.get("LOOKSAM_MPI", Path.home() / ".cache" / "ds_looksam-mpi")) / kind
    python = folder / "bin" / "python"
    if not (folder / "bin" / "mpirun").exists():
        return f"no {kind} in {folder}; make one with: bash tests/mpi.sh"
    here = next(p for p in sys.path if p.endswith("site-packages"))
    path_file = next(folder.glob("lib/python*/site-packages")) / "packages-of-the-tests.pth"
    path_file.write_text(f"{here}\n")
    return python


@pytest.mark.hosts
@pytest.mark.parametrize("through", ["mpirun", "deepspeed"])
def test_mpi(mpi_job, through):
    options = ["--deepspeed"] if through == "deepspeed" else ["--bind", "1"]
    if mpi_job.kind == "openmpi":
        options += ["--launcher-args", "--map-by :OVERSUBSCRIBE"] if through == "deepspeed" else []
    mpi_job.start(f"{mpi_job.kind}.sh", "--hostfile", "hosts", *options).succeeds()
    mpi_job.check_weights()
    if through == "mpirun":
        mpi_job.check_binding()


@pytest.fixture(scope="module")
def slurm_cluster(two_hosts, tmp_path_factory) -> None:
    if absent := [p for p in slurm.PROGRAMS if not hosts.which(p)]:
        pytest.skip(f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)")
    slurm.start(two_hosts, tmp_path_factory.mktemp("slurm"))


@dataclass
class SlurmJob:
    """launch/slurm.sbatch in the queue."""

    job: Job
    number: str

    @classmethod
    def submit(cls, job: Job, *program: str) -> SlurmJob:
        """With the tiny program, which is told ``program`` beside."""
        return cls.submit_script(job, "--program", str(ROOT / "tests" / "launched.py"), "--", "--case",
                                 str(job.folder / "case.pickle"), "--out", str(job.folder), *program)

    @classmethod
    def submit_script(cls, job: Job, *arguments: str) -> SlurmJob:
        variables = [line for line in (job.folder / ".deepspeed_env").read_text().splitlines() if "=" in line]
        return cls(job, job.hosts[0].run([
            "env", *(f"{name}={value}" for name, value in job.environment.items()), "sbatch", "--parsable", "--nodes=2",
            "--ntasks-per-node=2", f"--output={job.folder}/slurm.out", "launch/slurm.sbatch",
            *(word for line in variables for word in ("--env", line)), *arguments], cwd=ROOT).strip())

    def facts(self) -> dict[str, str]:
        fields = self.job.hosts[0].run(["scontrol", "--oneliner", "show", "job", self.number]).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def output(self) -> str:
        file = self.job.folder / "slurm.out"
        return file.read_text(errors="replace")[-10_000:] if file.exists() else ""

    def wait(self, condition: Callable[[], bool], seconds: float = RUN_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.facts()}\n{self.output()}"
            time.sleep(0.5)

    def wait_for_all_ranks(self, file: str) -> None:
        def written() -> bool:
            assert self.facts()["JobState"] not in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT"), self.output()
            return all((self.job.folder / f"{file}-rank-{rank}").exists() for rank in range(self.job.case.world))
        self.wait(written)

    def wait_for_end(self, seconds: float = RUN_SECONDS) -> dict[str, str]:
        self.wait(lambda: self.facts()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
        for host in self.job.hosts:
            left = host.wait_until_idle(AFTERMATH)
            assert not left, left
        return self.facts()


@pytest.mark.hosts
def test_slurm_requeues_a_job_that_saved_on_a_signal_or_was_preempted(job, slurm_cluster):
    """srun, one task a slot. The signal that announces the end of the time, then a job of a better partition."""
    slurm_job = SlurmJob.submit(job, "--checkpoints", str(job.folder / "checkpoints"), "--wait-at", "2", "5")
    slurm_job.wait_for_all_ranks("waiting-at-2")
    job.hosts[0].run(["scancel", "--signal=USR1", slurm_job.number])
    slurm_job.wait_for_all_ranks("waiting-at-5")
    assert slurm_job.facts()["Restarts"] == "1"
    urgent = job.hosts[0].run(["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1",
                               "--output=/dev/null"], cwd=ROOT).strip()
    SlurmJob(job, urgent).wait(lambda: SlurmJob(job, urgent).facts()["JobState"] == "COMPLETED")
    slurm_job.wait(lambda: (job.folder / "rank-0.pt").exists())
    facts = slurm_job.wait_for_end()
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "2", "0:0"), slurm_job.output()
    assert job.starts() == [0, 2, 5]
    job.check_weights()


@pytest.mark.hosts
def test_train_py_that_slurm_stopped_goes_on(job, slurm_cluster, data):  # noqa: F811
    """The default program: requeued after the signal before the end of its time, it is the run that was not stopped."""
    def arguments(run: str) -> list[str]:
        return ["--env", f"PYTHONPATH={ROOT}", "--", "--model", MODEL,
                *options(data, job.folder / run, "looksam_zero2", epochs=12), "--resume"]

    job.start_script("ssh.sh", "--hostfile", "hosts", *arguments("whole")).succeeds()
    slurm_job = SlurmJob.submit_script(job, *arguments("stopped"))
    slurm_job.wait(lambda: (job.folder / "stopped" / "checkpoints" / "latest").exists())
    job.hosts[0].run(["scancel", "--signal=USR1", slurm_job.number])
    slurm_job.wait(lambda: slurm_job.facts()["Restarts"] == "1")
    slurm_job.wait(lambda: (job.folder / "stopped" / "metrics.png").exists())
    facts = slurm_job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), slurm_job.output()
    updates = 12 * 5  # 642 images in batches of 128
    whole, stopped = weights(job.folder / "whole", updates), weights(job.folder / "stopped", updates)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


# What goes wrong ---------------------------------------------------------------------------------------------------


PDSH = pytest.param("pdsh.sh", marks=[pytest.mark.hosts, needs("pdsh")])
SCRIPTS = ["ssh.sh", PDSH, pytest.param("torchrun.sh", marks=pytest.mark.hosts)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_host_that_cannot_be_reached(job, script):
    job.write_hostfile("host-a", hosts.GONE)
    job.start(script, "--hostfile", "hosts").fails(REFUSAL_SECONDS, f"error: {hosts.GONE}: ", "nothing was started")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_port_that_is_taken(job, script, tmp_path):
    taken = job.hosts[0].start([sys.executable, "-c", "import socket, time; s = socket.create_server(('', 29500)); "
                                "open('taken', 'w').close(); time.sleep(600)"], tmp_path, job.environment,
                               tmp_path / "taken.log")
    while not (tmp_path / "taken").exists():
        time.sleep(0.1)
    try:
        launch = job.start(script, "--hostfile", "hosts")
        assert launch.finish(REFUSAL_SECONDS) == 2
        assert "host-a: port 29500 cannot be used (Address already in use)" in launch.output()
        assert "--master-port" in launch.output()
    finally:
        taken.kill()  # nsenter only; the program itself is ended below
        taken.wait()
        for pid in job.hosts[0].processes():
            os.kill(pid, 9)
    launch.nothing_is_left()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_rank_that_dies_on_the_other_host_ends_a_job_that_hangs(job, script):
    """The others are asleep, as in a collective that waits for its time-out: nothing but the script can end them."""
    launch = job.start(script, "--hostfile", "hosts", program=("--die-at", "2", "--hang"))
    wait_for(job.folder / "died", launch)
    launch.fails(DEATH_SECONDS, "error: the job ended with exit code", "ending what is left of looksam-")


@pytest.mark.hosts
def test_a_rank_that_dies_on_the_other_host_under_mpi(mpi_job):
    launch = mpi_job.start(f"{mpi_job.kind}.sh", "--hostfile", "hosts", program=("--die-at", "2", "--hang"))
    wait_for(mpi_job.folder / "died", launch)
    launch.fails(DEATH_SECONDS, "error: the job ended with exit code")


@pytest.mark.hosts
def test_a_rank_that_dies_on_the_other_host_under_slurm(job, slurm_cluster):
    slurm_job = SlurmJob.submit(job, "--die-at", "2", "--hang")
    slurm_job.wait(lambda: (job.folder / "died").exists())
    facts = slurm_job.wait_for_end(DEATH_SECONDS)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), facts
    assert "host-b: task 3: Exited with exit code 137" in slurm_job.output()  # 128 + SIGKILL
    assert "error: the job ended with exit code" in slurm_job.output()


@pytest.mark.hosts
def test_a_script_that_is_told_to_stop_takes_everything_with_it(job):
    launch = job.start("ssh.sh", "--hostfile", "hosts", program=("--die-at", "0", "--hang", "--nobody-dies"))
    wait_for(job.folder / "hanging", launch)
    launch.terminate()
    assert launch.fails(DEATH_SECONDS, "TERM: telling the ranks to stop") == 143


@pytest.mark.hosts
@pytest.mark.parametrize("script", ["ssh.sh", PDSH])
def test_a_job_that_is_told_to_stop_saves_and_goes_on(job, script):
    program = ("--checkpoints", str(job.folder / "checkpoints"), "--wait-at", "4")
    launch = job.start(script, "--hostfile", "hosts", program=program)
    for rank in range(4):
        wait_for(job.folder / f"waiting-at-4-rank-{rank}", launch)
    launch.terminate()
    assert launch.fails(DEATH_SECONDS, "the job has saved a checkpoint and can be started again") == 75
    job.start(script, "--hostfile", "hosts", program=program).succeeds()
    assert job.starts() == [0, 4]
    job.check_weights()


@pytest.mark.hosts
def test_what_a_killed_script_leaves_can_be_ended_by_its_name(job):
    launch = job.start("ssh.sh", "--hostfile", "hosts", program=("--die-at", "0", "--hang", "--nobody-dies"))
    wait_for(job.folder / "hanging", launch)
    launch.terminate(signal.SIGKILL)
    launch.process.wait(AFTERMATH)
    name = launch.output().split("LOOKSAM_JOB=")[1].split()[0]
    assert all(host.processes() for host in job.hosts)
    stop = job.start_script("stop.sh", "--hostfile", "hosts", "--", name)
    assert stop.finish(REFUSAL_SECONDS) == 0, stop.output()
    stop.nothing_is_left()


@pytest.mark.hosts
def test_a_second_host_that_never_comes(job):
    """Without ssh a script cannot look at the other host; the rendezvous gives up after DEEPSPEED_TIMEOUT minutes."""
    launch = job.start("no_ssh.sh", "--hostfile", "hosts", "--node-rank", "0", "--env", "DEEPSPEED_TIMEOUT=1")
    launch.fails(RUN_SECONDS, "2/4 clients joined")


def test_hosts_with_different_versions_are_named(job, tmp_path):
    """host-b has another ds_looksam where host-a has this one."""
    package, other = Path(ds_looksam.__file__).parent, tmp_path / "ds_looksam"
    shutil.copytree(package, other)
    versions = other / "ranks" / "versions.py"
    versions.write_text(versions.read_text().replace("__version__ = ", "__version__ = '9.9.9' or "))
    job.hosts[1].run(["mount", "--bind", str(other), str(package)])
    try:
        launch = job.start("ssh.sh", "--hostfile", "hosts")
        launch.fails(RUN_SECONDS, "LookSAMVersionError", "ds_looksam 9.9.9", "on ranks 2-3 (host-b)")
    finally:
        job.hosts[1].run(["umount", str(package)])


def wait_for(file: Path, launch: Launch) -> None:
    """A rank has got as far as to write it."""
    deadline = time.monotonic() + RUN_SECONDS
    while not file.exists():
        assert launch.process.poll() is None and time.monotonic() < deadline, launch.output()
        time.sleep(0.2)
