"""What the launch scripts refuse before they start anything, and what they would run. By bash, but for the last."""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from launch import distributed
from tests.jobs import Job
from tests.training import Case, engine_for, train_window

ROOT = Path(__file__).parent.parent
SCRIPTS = ["torchrun.sh", "pdsh.sh", "ssh.sh", "no_ssh.sh", "openmpi.sh", "mpich.sh"]
HOSTS = "node-1 slots=4\nnode-2 slots=8 # larger\n"


def start(folder: Path, command: str, files: dict[str, str] | None = None, terminal: int | None = None,
          **environment: str) -> subprocess.Popen[str]:
    """A script of launch/ and its arguments, in an empty home with these files, which are also programs, and with a
    program that does nothing. ``terminal``: its own, instead of pipes."""
    for name, text in {"program.py": "", "hosts": HOSTS, **(files or {})}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script, *arguments = shlex.split(command)
    python = folder / "python" if (folder / "python").exists() else sys.executable
    return subprocess.Popen(["bash", str(ROOT / "launch" / script), *arguments], cwd=folder, text=True,
                            stdout=terminal or subprocess.PIPE, stderr=terminal or subprocess.PIPE,
                            stdin=terminal or subprocess.DEVNULL, start_new_session=True,
                            preexec_fn=terminal and partial(fcntl.ioctl, terminal, termios.TIOCSCTTY, 0),
                            env={"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "PYTHON": str(python),
                                 "LC_ALL": "C.UTF-8", **environment})


def result_of(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.terminate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(folder: Path, command: str, files: dict[str, str] | None = None,
        **environment: str) -> subprocess.CompletedProcess[str]:
    return result_of(start(folder, command, files, **environment))


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
    assert " LOOKSAM_JOB=looksam-" in told, "launch/stop.sh asks for it"


@pytest.mark.parametrize(("command", "files", "words"), [
    ("ssh.sh --hostfile hosts", {"hosts": "node-1\n"}, ["line 1", "NAME slots=N"]),
    ("ssh.sh --hostfile hosts", {"hosts": "node-1 slots=2\nnode-2 slots=two\n"}, ["line 2", "NAME slots=N"]),
    ("ssh.sh --hostfile hosts", {"hosts": "node-1 slots=0\n"}, ["node-1 has no slots"]),
    ("ssh.sh --hostfile hosts", {"hosts": "node-1 slots=2\n\nnode-1 slots=2\n"}, ["line 3", "twice"]),
    ("ssh.sh --hostfile hosts", {"hosts": "# nothing\n\n"}, ["names no host"]),
    ("torchrun.sh", {".deepspeed_env": "A=1\nexport B=2\n"}, [".deepspeed_env", "export B=2", "NAME=VALUE"]),
    ("torchrun.sh --restarts 3 -- --data-dir x", {}, ["--resume"]),
    ("torchrun.sh --hostfile hosts --slots 2", {}, ["--slots", "slots=N"]),
    ("torchrun.sh --slots 2 --master-addr node-1", {}, ["--master-addr", "--hostfile"]),
    ("torchrun.sh --slots 2 --env NOT_SET_ANYWHERE", {}, ["NOT_SET_ANYWHERE", "NOT_SET_ANYWHERE=VALUE"]),
    ("pdsh.sh --hostfile hosts --env 'TOKEN=pa$$word'", {"pdsh": ""}, ["TOKEN", "launch/ssh.sh"]),
    ("pdsh.sh --hostfile hosts -- --only 'stage.(1|2)'", {"pdsh": ""}, ["stage.(1|2)", "launch/ssh.sh"]),
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


def test_verify_is_a_program_for_the_launch_scripts() -> None:
    """With what DeepSpeed's launcher puts in front of its arguments."""
    result = subprocess.run([sys.executable, ROOT / "launch" / "verify.py", "--local_rank=0", "--help"], text=True,
                            capture_output=True, check=True)
    assert "ds-looksam verify" in result.stdout and "--folder" in result.stdout


SAVES = """
import os, signal, sys, time
rank, told = int(os.environ["RANK"]), []
signal.signal(signal.SIGTERM, lambda *_: told.append(open(f"told-{rank}", "a").write("x")))
open(f"started-{rank}", "a").write("x")
while not told and not os.path.exists("finish"):
    time.sleep(0.05)
if told:
    time.sleep(2 * rank)
    open(f"saved-{rank}", "a").write("x")
    sys.exit(int(sys.argv[1]) if rank == 0 else 75)
"""
"""Rank 1 takes longer to save."""


@pytest.mark.parametrize(("number", "to_group", "ends_with", "code"), [
    (signal.SIGTERM, False, 75, 75), (signal.SIGINT, True, 75, 75), (signal.SIGTERM, False, 3, 143)])
def test_torchrun_told_to_stop_lets_every_rank_save_and_starts_none_again(tmp_path, number, to_group, ends_with, code):
    """By a signal to the script, or as Ctrl-C sends it, to all of the script's process group."""
    again = "--restarts 2" if code == 75 else ""
    script = start(tmp_path, f"torchrun.sh --slots 2 {again} --program saves.py -- {ends_with}", {"saves.py": SAVES})
    wait_for(script, lambda: all((tmp_path / f"started-{rank}").exists() for rank in (0, 1)))
    (os.killpg if to_group else os.kill)(script.pid, number)
    result = result_of(script)
    assert result.returncode == code, result.stderr
    told = sorted(path.name for path in tmp_path.glob("*-?") if path.read_text() == "x")
    if code == 75:  # each of it once
        assert told == ["saved-0", "saved-1", "started-0", "started-1", "told-0", "told-1"]
    assert ("the job has saved a checkpoint and can be started again" in result.stderr) == (code == 75)


def test_torchrun_whose_terminal_is_closed_lets_every_rank_save(tmp_path):
    """What the script prints then fails."""
    ours, its = pty.openpty()
    script = start(tmp_path, "torchrun.sh --slots 2 --program saves.py -- 75", {"saves.py": SAVES}, terminal=its)
    os.close(its)
    wait_for(script, lambda: all((tmp_path / f"started-{rank}").exists() for rank in (0, 1)))
    os.close(ours)
    assert script.wait(120) == 75
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))


def test_torchrun_runs_a_program_that_is_no_python(tmp_path):
    result = run(tmp_path, "torchrun.sh --slots 2 --launcher-args --no-python --program program.sh", {
        "program.sh": "#!/bin/sh\necho rank $RANK\n"})
    assert result.returncode == 0 and {"rank 0", "rank 1"} <= set(result.stdout.splitlines()), result.stderr


def test_torchrun_that_starts_ranks_again_forgets_who_had_saved(tmp_path):
    """Rank 1 saves while rank 0 fails; both are started again, and finish: the job has finished."""
    program = """
import os, sys, time
assert "torch" not in sys.modules, "too late for a program that sets OMP_NUM_THREADS"
rank = int(os.environ["RANK"])
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    while rank == 0 and not any(os.scandir(os.environ["SAVED"])):
        time.sleep(0.05)
    if rank == 1:
        open(os.environ["SAVED"] + "/now", "w").close()
    sys.exit(75 if rank == 1 else 3)
open(f"finished-{rank}", "w").close()
"""
    (tmp_path / "saved").mkdir()
    result = run(tmp_path, "torchrun.sh --slots 2 --restarts 1 --program fails.py -- --resume", {"fails.py": program},
                 SAVED=str(tmp_path / "saved"))
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.glob("finished-*")} == {"finished-0", "finished-1"}


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


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
