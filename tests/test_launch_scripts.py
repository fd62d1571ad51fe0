"""What the launch scripts refuse before they start anything, and what they would run. Needs bash only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["torchrun.sh", "pdsh.sh", "ssh.sh", "no_ssh.sh", "openmpi.sh", "mpich.sh"]


def run(tmp_path: Path, script: str, *arguments: str, program: str | None = "program.py",
        **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an empty home, with a program that is never started."""
    (tmp_path / "program.py").touch()
    programs = ["--program", program] if program else []
    return subprocess.run(["bash", str(ROOT / "launch" / script), *programs, *arguments], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120, stdin=subprocess.DEVNULL,
                          env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": sys.executable,
                               "LC_ALL": "C.UTF-8", **environment})


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), result.stderr
    assert "\n+ " not in result.stderr, "a command was printed all the same"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_and_refuses_the_same(tmp_path, script):
    refused(run(tmp_path, script, "--hostfil", "x"), "--hostfil", "--help")
    refused(run(tmp_path, script, "--data-dir", "x"), "--data-dir", "behind --")
    refused(run(tmp_path, script, "--hostfile"), "--hostfile needs a value")
    refused(run(tmp_path, script, "--hostfile", "absent"), "absent", "NAME slots=N")
    refused(run(tmp_path, script, "--master-port", "99999"), "99999", "1-65535")
    refused(run(tmp_path, script, "--master-port", "many"), "not a number")
    refused(run(tmp_path, script, program="absent.py"), "absent.py")
    usage = run(tmp_path, script, "--help")
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
    (tmp_path / "hosts").write_text(text)
    refused(run(tmp_path, "ssh.sh", "--hostfile", "hosts"), *words)


def test_environment_file_with_a_bad_line(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport B=2\n")
    refused(run(tmp_path, "torchrun.sh"), ".deepspeed_env", "export B=2", "NAME=VALUE")


def test_variables_of_the_working_folder_and_the_command_line_win(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("A=home\nB=home\nC=home\n")
    (tmp_path / ".deepspeed_env").write_text("B=here\nC=here\n")
    result = run(tmp_path, "torchrun.sh", "--slots", "2", "--env", "C=line", "--env", "D", program="show.sh",
                 HOME=str(home), D="from the shell", **show_environment(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "home here line from the shell\n"


def show_environment(tmp_path: Path) -> dict[str, str]:
    """An interpreter that prints variables instead of launching."""
    (tmp_path / "show.sh").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$A $B $C $D"\n')
    python.chmod(0o755)
    return {"PYTHON": str(python)}


def test_the_exit_code_is_the_jobs(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 17\n")
    python.chmod(0o755)
    result = run(tmp_path, "torchrun.sh", "--slots", "1", PYTHON=str(python))
    assert result.returncode == 17
    assert "error: the job ended with exit code 17" in result.stderr


def test_restarts_without_resume_are_refused(tmp_path):
    refused(run(tmp_path, "torchrun.sh", "--restarts", "3", "--", "--data-dir", "x", program=None), "--resume")
    result = run(tmp_path, "torchrun.sh", "--slots", "2", "--restarts", "3", "--dry-run", "--", "--resume",
                 program=None)
    assert result.returncode == 0, result.stderr
    assert "--max-restarts 3" in result.stderr and "launch/train.py --resume" in result.stderr


def test_node_ranks(tmp_path):
    (tmp_path / "hosts").write_text("node-1 slots=4\nnode-2 slots=8 # larger\n")
    refused(run(tmp_path, "no_ssh.sh", "--hostfile", "hosts"), "--node-rank is needed")
    refused(run(tmp_path, "no_ssh.sh", "--hostfile", "hosts", "--node-rank", "2"), "2 hosts")
    for script, words in {"no_ssh.sh": ["--no_ssh", "--node_rank 1", "--master_addr node-1"],
                          "torchrun.sh": ["--nnodes 2", "--nproc-per-node 8", "--rdzv-endpoint node-1:29500",
                                          "is_host=0"]}.items():
        result = run(tmp_path, script, "--hostfile", "hosts", "--node-rank", "1", "--dry-run", "--", "--text",
                     "two words")
        assert result.returncode == 0, result.stderr
        for word in [*words, r"--text two\ words"]:
            assert word in result.stderr


@pytest.mark.parametrize(("script", "says", "library"), [
    ("openmpi.sh", "HYDRA build details", ""),
    ("mpich.sh", "mpirun (Open MPI) 5.0.1", ""),
    ("openmpi.sh", "mpirun (Open MPI) 5.0.1", "MPICH Version: 5.0"),
    ("mpich.sh", "HYDRA build details", "Open MPI v5.0.1"),
])
def test_mpirun_and_mpi4py_of_different_mpis_are_refused(tmp_path, script, says, library):
    for name, output in {"mpirun": says, "python": library}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{output}'\n")
        (tmp_path / name).chmod(0o755)
    refused(run(tmp_path, script, "--slots", "2", PATH=f"{tmp_path}:{os.environ['PATH']}",
                PYTHON=str(tmp_path / "python")), "mpi4py is built for" if library else "use the other script")


def test_a_missing_launcher_is_named(tmp_path):
    (tmp_path / "hosts").write_text("node-1 slots=2\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in "bash", "dirname", "realpath", "date", "grep":
        (tools / name).symlink_to(shutil.which(name))
    for script, missing in {"pdsh.sh": "pdsh", "ssh.sh": "ssh", "openmpi.sh": "mpirun"}.items():
        refused(run(tmp_path, script, "--hostfile", "hosts", PATH=str(tools)), f"{missing} is not installed here")


def test_slurm_script_outside_slurm(tmp_path):
    result = subprocess.run(["bash", "launch/slurm.sbatch"], cwd=ROOT, text=True, capture_output=True, timeout=60,
                            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": sys.executable})
    refused(result, "sbatch launch/slurm.sbatch")


def test_leave_ends_the_threads_of_the_process_group():
    """With torch.distributed.destroy_process_group one in fifteen processes that ended at once was aborted."""
    program = """if True:
        import os
        from launch import distributed
        from tests.training import Case, engine_for, train_window

        def gloo():
            names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
            return sum("gloo" in name for name in names)

        distributed.join()
        case = Case(world=1, updates=1)
        with engine_for(case) as engine:
            train_window(engine, case, 0)
        before = gloo()
        del engine
        distributed.leave()
        print(f"{before > 0} {gloo()}")
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True 0"
