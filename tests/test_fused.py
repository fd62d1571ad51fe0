"""The Triton kernels of the shard arithmetic, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/interpreted.py"], text=True,
                          capture_output=True, cwd=Path(__file__).parent.parent,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
