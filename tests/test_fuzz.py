"""A short run of the fuzz command; ``python -m tests.fuzz --draws 300`` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_few_draws() -> None:
    run = subprocess.run([sys.executable, "-m", "tests.fuzz", "--draws", "10", "--seed", "0"], timeout=280,
                         cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
