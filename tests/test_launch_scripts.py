"""What the launch scripts refuse before they start anything, and what they would run. Needs bash only."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["torchrun.sh", "pdsh.sh", "ssh.sh", "no_ssh.sh", "openmpi.sh", "mpich.sh"]
HOSTS = "node-1 slots=4\nnode-2 slots=8 # larger\n"


def run(folder: Path, command: str, hosts: str = HOSTS, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of launch/ and its arguments, in an empty home with a program that is never started."""
    (folder / "program.py").touch()
    (folder / "hosts").write_text(hosts)
    script, *arguments = shlex.split(command)
    return subprocess.run(["bash", str(ROOT / "launch" / script), *arguments], cwd=folder, text=True, timeout=120,
                          capture_output=True, stdin=subprocess.DEVNULL,
                          env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHON": sys.executable,
                               "LC_ALL": "C.UTF-8", **environment})


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), result.stderr
    assert "\n+ " not in result.stderr, "a command was printed all the same"


def fake(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


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
    usage = run(tmp_path, f"{script} --help")
    for option in "--hostfile", "--slots", "--master-port", "--env", "--program", "--dry-run", f"launch/{script}":
        assert option in usage.stderr


@pytest.mark.parametrize(("text", "words"), [
    ("node-1\n", ["line 1", "NAME slots=N"]),
    ("node-1 slots=2\nnode-2 slots=two\n", ["line 2", "NAME slots=N"]),
    ("node-1 slots=0\n", ["node-1 has no slots"]),
    ("node-1 slots=2\n\nnode-1 slots=2\n", ["line 3", "twice"]),
    ("# nothing\n\n", ["names no host"]),
])
def test_hostfiles_that_are_refused(tmp_path, text, words):
    refused(run(tmp_path, "ssh.sh --hostfile hosts", hosts=text), *words)


@pytest.mark.parametrize(("command", "words"), [
    ("no_ssh.sh --hostfile hosts", ["--node-rank is needed"]),
    ("no_ssh.sh --hostfile hosts --node-rank 2", ["2 hosts"]),
    ("torchrun.sh --restarts 3 -- --data-dir x", ["--resume"]),
    ("torchrun.sh --slots 2 --restarts 3 --dry-run -- --resume", ["--max-restarts 3", "launch/train.py --resume"]),
    *[(f"{script} --hostfile hosts --node-rank 1 --dry-run -- --text 'two words'", [r"--text two\ words", *words])
      for script, words in {"no_ssh.sh": ["--no_ssh", "--node_rank 1", "--master_addr node-1"],
                            "torchrun.sh": ["--nnodes 2", "--nproc-per-node 8", "--rdzv-endpoint node-1:29500",
                                            "is_host=0"]}.items()],
])
def test_what_only_some_scripts_take(tmp_path, command, words):
    result = run(tmp_path, command)
    if "--dry-run" not in command:
        refused(result, *words)
    else:
        assert result.returncode == 0 and all(word in result.stderr for word in words), result.stderr


def test_environment_files_and_the_exit_code(tmp_path):
    """The command line wins over the working folder's, which wins over the home's. The interpreter prints variables."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("A=home\nB=home\nC=home\n")
    (tmp_path / ".deepspeed_env").write_text("B=here\nC=here\n")
    result = run(tmp_path, "torchrun.sh --program program.py --slots 2 --env C=line --env D", HOME=str(home),
                 D="from the shell", PYTHON=fake(tmp_path / "python", 'echo "$A $B $C $D"; exit 17'))
    assert result.stdout == "home here line from the shell\n"
    assert result.returncode == 17 and "error: the job ended with exit code 17" in result.stderr
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport B=2\n")
    refused(run(tmp_path, "torchrun.sh"), ".deepspeed_env", "export B=2", "NAME=VALUE")


@pytest.mark.parametrize(("script", "says", "library"), [
    ("openmpi.sh", "HYDRA build details", ""),
    ("mpich.sh", "mpirun (Open MPI) 5.0.1", ""),
    ("openmpi.sh", "mpirun (Open MPI) 5.0.1", "MPICH Version: 5.0"),
    ("mpich.sh", "HYDRA build details", "Open MPI v5.0.1"),
])
def test_mpirun_and_mpi4py_of_different_mpis_are_refused(tmp_path, script, says, library):
    fake(tmp_path / "mpirun", f"echo '{says}'")
    python = fake(tmp_path / "python", f"echo '{library}'")
    refused(run(tmp_path, f"{script} --slots 2", PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=python),
            "mpi4py is built for" if library else "use the other script")


@pytest.mark.parametrize(("script", "missing"), [("pdsh.sh", "pdsh"), ("ssh.sh", "ssh"), ("openmpi.sh", "mpirun")])
def test_a_missing_launcher_is_named(tmp_path, script, missing):
    for name in "bash", "dirname", "realpath", "date", "grep":
        (tmp_path / name).symlink_to(shutil.which(name))
    refused(run(tmp_path, f"{script} --hostfile hosts", PATH=str(tmp_path)), f"{missing} is not installed here")


def test_slurm_script_outside_slurm_or_without_what_it_needs(tmp_path):
    fake(tmp_path / "srun", "")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name, value, words in [("HOME", str(tmp_path), "submit from the repository's root"),
                               ("SLURM_SUBMIT_DIR", str(ROOT), "this is a batch script: sbatch launch/slurm.sbatch"),
                               ("SLURM_JOB_ID", "1", "--ntasks-per-node N is needed"),
                               ("SLURM_NTASKS_PER_NODE", "2", "a requeued job: launch/train.py must go on"),
                               ("SLURM_GPUS_ON_NODE", "4", "2 tasks but 4 GPUs on a node")]:
        environment[name] = value
        refused(run(tmp_path, "slurm.sbatch", **environment), words)


def test_leave_ends_the_threads_of_the_process_group():
    """With torch.distributed.destroy_process_group one in fifteen processes that ended at once was aborted."""
    program = """if True:
        from pathlib import Path
        from launch import distributed
        from tests.training import Case, engine_for, train_window

        def gloo():
            return sum("gloo" in file.read_text() for file in Path("/proc/self/task").glob("*/comm"))

        distributed.join()
        with engine_for(Case(world=1)) as engine:
            train_window(engine, Case(world=1), 0)
        before = gloo()
        del engine
        distributed.leave()
        print(before > 0, gloo())
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=240)
    assert done.stdout.splitlines()[-1:] == ["True 0"], done.stdout + done.stderr
