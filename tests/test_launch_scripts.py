"""What the launch scripts refuse before they start anything, and what they would run. By bash, but for the last."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import distributed
from tests.jobs import Job
from tests.training import Case, engine_for, train_window

ROOT = Path(__file__).parent.parent
SCRIPTS = ["torchrun.sh", "pdsh.sh", "ssh.sh", "no_ssh.sh", "openmpi.sh", "mpich.sh"]
HOSTS = "node-1 slots=4\nnode-2 slots=8 # larger\n"


def run(folder: Path, command: str, files: dict[str, str] | None = None,
        **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of launch/ and its arguments, in an empty home with these files, which are also programs, and with a
    program that is never started."""
    for name, text in {"program.py": "", "hosts": HOSTS, **(files or {})}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script, *arguments = shlex.split(command)
    python = folder / "python" if (folder / "python").exists() else sys.executable
    return subprocess.run(["bash", str(ROOT / "launch" / script), *arguments], cwd=folder, text=True, timeout=120,
                          capture_output=True, stdin=subprocess.DEVNULL,
                          env={"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "PYTHON": str(python),
                               "LC_ALL": "C.UTF-8", **environment})


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), result.stderr
    assert "\n+ " not in result.stderr, "a command was printed all the same"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_and_refuses_the_same(tmp_path, script):
    for arguments, *words in [
        ("--hostfil x", "--hostfil", "--help"),
        ("--data-dir x", "--data-dir", "behind --"),
        ("--hostfile", "--hostfile needs a value"),
        ("--hostfile absent", "absent", "NAME slots=N"),
        ("--master-port 99999", "99999", "1-65535"),
        ("--master-port many", "not a number"),
        ("--program absent.py", "absent.py"),
    ]:
        refused(run(tmp_path, f"{script} --program program.py {arguments}"), *words)
    usage = run(tmp_path, f"{script} --help").stderr
    for option in "--hostfile", "--slots", "--master-port", "--env", "--program", "--dry-run", f"launch/{script}":
        assert option in usage


def echo(text: str) -> str:
    return f"#!/bin/sh\necho '{text}'\n"


OPENMPI, MPICH = echo("mpirun (Open MPI) 5.0.1"), echo("HYDRA build details")


@pytest.mark.parametrize(("script", "files"), [
    ("torchrun.sh", {}), ("openmpi.sh", {"mpirun": OPENMPI, "python": echo("Open MPI v5.0.1")}),
    ("mpich.sh", {"mpirun": MPICH, "python": echo("MPICH Version: 5.0")})])
def test_a_token_is_in_no_command(tmp_path, script, files):
    told = run(tmp_path, f"{script} --slots 2 --dry-run --env TOKEN=secret --program program.py", files).stderr
    assert "TOKEN" in told and "secret" not in told, told


@pytest.mark.parametrize(("command", "files", "words"), [
    ("ssh.sh --hostfile hosts", {"hosts": "node-1\n"}, ["line 1", "NAME slots=N"]),
    ("ssh.sh --hostfile hosts", {"hosts": "node-1 slots=2\nnode-2 slots=two\n"}, ["line 2", "NAME slots=N"]),
    ("ssh.sh --hostfile hosts", {"hosts": "node-1 slots=0\n"}, ["node-1 has no slots"]),
    ("ssh.sh --hostfile hosts", {"hosts": "node-1 slots=2\n\nnode-1 slots=2\n"}, ["line 3", "twice"]),
    ("ssh.sh --hostfile hosts", {"hosts": "# nothing\n\n"}, ["names no host"]),
    ("torchrun.sh", {".deepspeed_env": "A=1\nexport B=2\n"}, [".deepspeed_env", "export B=2", "NAME=VALUE"]),
    ("torchrun.sh --restarts 3 -- --data-dir x", {}, ["--resume"]),
    ("no_ssh.sh --hostfile hosts", {}, ["--node-rank is needed"]),
    ("no_ssh.sh --hostfile hosts --node-rank 2", {}, ["2 hosts"]),
    ("openmpi.sh --slots 2", {"mpirun": MPICH}, ["use the other script"]),
    ("mpich.sh --slots 2", {"mpirun": OPENMPI}, ["use the other script"]),
    ("openmpi.sh --slots 2", {"mpirun": OPENMPI, "python": echo("MPICH Version: 5.0")}, ["mpi4py is built for"]),
    ("mpich.sh --slots 2", {"mpirun": MPICH, "python": echo("Open MPI v5.0.1")}, ["mpi4py is built for"]),
])
def test_what_some_scripts_refuse(tmp_path, command, files, words):
    refused(run(tmp_path, command, files), *words)


@pytest.mark.parametrize(("command", "words"), [
    ("torchrun.sh --slots 2 --restarts 3 --dry-run -- --resume", ["--max-restarts 3", "launch/train.py --resume"]),
    ("no_ssh.sh --hostfile hosts --node-rank 1 --dry-run -- --text 'two words'",
     ["--no_ssh", "--node_rank 1", "--master_addr node-1", r"--text two\ words"]),
    ("torchrun.sh --hostfile hosts --node-rank 1 --dry-run -- --text 'two words'",
     ["--nnodes 2", "--nproc-per-node 8", "--rdzv-endpoint node-1:29500", "is_host=0", r"--text two\ words"]),
])
def test_what_would_be_run(tmp_path, command, words):
    result = run(tmp_path, command)
    assert result.returncode == 0 and all(word in result.stderr for word in words), result.stderr


def test_variables_of_the_working_folder_and_the_command_line_win(tmp_path):
    """And the exit code is the job's. The interpreter is one that prints variables."""
    (tmp_path / "home").mkdir()
    result = run(tmp_path, "torchrun.sh --program program.py --slots 2 --env C=line --env D", {
        "home/.deepspeed_env": "A=home\nB=home\nC=home\n", ".deepspeed_env": "B=here\nC=here\n",
        "python": "#!/bin/sh\necho $A $B $C $D\nexit 17\n"}, HOME=str(tmp_path / "home"), D="from the shell")
    assert result.stdout == "home here line from the shell\n"
    assert result.returncode == 17 and "error: the job ended with exit code 17" in result.stderr


@pytest.mark.parametrize(("script", "missing"), [("pdsh.sh", "pdsh"), ("ssh.sh", "ssh"), ("openmpi.sh", "mpirun")])
def test_a_missing_launcher_is_named(tmp_path, script, missing):
    for name in "bash", "dirname", "realpath", "date", "grep":
        (tmp_path / name).symlink_to(shutil.which(name))
    refused(run(tmp_path, f"{script} --hostfile hosts", PATH=str(tmp_path)), f"{missing} is not installed here")


def test_what_the_slurm_script_needs(tmp_path):
    environment: dict[str, str] = {}
    for name, value, words in [("HOME", str(tmp_path), "submit from the repository's root"),
                               ("SLURM_SUBMIT_DIR", str(ROOT), "this is a batch script: sbatch launch/slurm.sbatch"),
                               ("SLURM_JOB_ID", "1", "--ntasks-per-node N is needed"),
                               ("SLURM_NTASKS_PER_NODE", "2", "a requeued job: launch/train.py must go on"),
                               ("SLURM_GPUS_ON_NODE", "4", "2 tasks but 4 GPUs on a node")]:
        environment[name] = value
        refused(run(tmp_path, "slurm.sbatch", {"srun": ""}, **environment), words)


def gloo_threads() -> int:
    return sum("gloo" in file.read_text() for file in Path("/proc/self/task").glob("*/comm"))


def train_and_leave() -> None:
    distributed.join()
    with engine_for(Case(world=1)) as engine:
        train_window(engine, Case(world=1), 0)
    assert gloo_threads() > 0
    del engine
    distributed.leave()
    assert gloo_threads() == 0


def test_leave_ends_the_threads_of_the_process_group(tmp_path):
    """With torch.distributed.destroy_process_group one in fifteen processes that ended at once was aborted."""
    job = Job(tmp_path, 1, train_and_leave)
    job.finish()
    assert job.codes == [0], job.outputs
