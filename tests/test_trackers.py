"""Tracking services behind DeepSpeed's monitors, offline: what they keep of ``Train/Samples/looksam_*`` is what
``engine.looksam`` said. comet_ml is no requirement of the tests: ``pip install comet_ml`` to run its case.

tests/test_metrics.py compares the values themselves with the oracle's, and csv and tensorboard with those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_looksam.step.monitor import ASCENTS, PREFIX, STEP_KINDS

ROOT = Path(__file__).parent.parent
Kept = dict[str, list[tuple[int, float]]]


def run_job(tracker: str, folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Two ranks in processes of their own: these packages start services and hook into others when they are imported.

    Samples seen and ``engine.looksam``, after each update.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                                "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
                                "WANDB_DIR": str(folder), "COMET_OFFLINE_DIRECTORY": str(folder)}
    # Into a file: the service process that wandb starts keeps a pipe open when the job is over.
    output = folder / "output"
    with output.open("w") as file:
        job = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                              str(ROOT / "tests" / "tracker_job.py"), tracker],
                             cwd=folder, env=environment, stdout=file, stderr=file, timeout=240)
    assert job.returncode == 0, output.read_text()
    [said] = [line for line in output.read_text().splitlines() if line.startswith("said: ")]
    return json.loads(said.removeprefix("said: "))


def comet(folder: Path) -> Iterator[tuple[str, int, float]]:
    """What is in the archive of an offline experiment."""
    [path] = folder.glob("*.zip")
    for line in zipfile.ZipFile(path).read("messages.json").splitlines():
        message = json.loads(line)
        metric = message.get("payload", {}).get("metric")
        if metric and metric["metricName"].startswith(PREFIX):
            yield metric["metricName"], int(metric["step"]), float(metric["metricValue"])


def wandb(folder: Path) -> Iterator[tuple[str, int, float]]:
    """What is in the log of an offline run: protobuf records in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # the rest of a block that has no room for a chunk's header
            at += room
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        record += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole record, or its last chunk
            history = Record.FromString(record).history
            record = b""
            for item in history.item:
                name = item.key or ".".join(item.nested_key)
                if name.startswith(PREFIX):
                    yield name, history.step.num, float(json.loads(item.value_json))


def expected(said: list[tuple[int, dict[str, Any]]]) -> Kept:
    kept: Kept = defaultdict(list)
    for samples, status in said:
        values = {**status, "step_kind": STEP_KINDS[status["step_kind"]], "ascent": ASCENTS[status["ascent"]],
                  "rho": status["rho"][0], "alpha": status["alpha"][0]}
        for name in values.keys() - {"k", "first_sam_update"}:  # no measurements, and what they are does not change
            value = values[name]
            host = name in ("updates", "evaluations", "step_kind", "ascent", "rho", "alpha")
            if value is not None and (host or status["step_kind"] == "sam"):
                kept[name].append((samples, value))
    return kept


@pytest.mark.parametrize(("tracker", "package", "read"), [("wandb", "wandb", wandb), ("comet", "comet_ml", comet)])
def test_the_service_is_told_what_engine_looksam_says(tracker: str, package: str, read: Any, tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True).returncode:
        pytest.skip(f"{package} is not installed")
    said = run_job(tracker, tmp_path)
    kept: Kept = defaultdict(list)
    for name, step, value in read(tmp_path):
        kept[name.removeprefix(PREFIX)].append((step, value))
    wanted = expected(said)
    assert {"sharpness", "gradient_norm", "beta", "step_kind", "rho"} <= wanted.keys() == kept.keys()
    for name, rows in wanted.items():
        # The job's numbers went through JSON and back, exactly; the services keep doubles.
        assert kept[name] == rows, name
