"""Tracking services behind DeepSpeed's monitors, offline: they keep what they are told of ``Train/Samples/looksam_*``.
comet_ml is no requirement of the tests: ``pip install comet_ml`` to run its case.

tests/test_metrics.py compares the values with the oracle's, and csv and tensorboard with those.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_looksam.step.monitor import PREFIX

ROOT = Path(__file__).parent.parent
TRACKERS: dict[str, dict[str, Any]] = {
    "wandb": {"enabled": True, "project": "looksam"},
    # By default one value in a hundred samples is kept.
    "comet": {"enabled": True, "project": "looksam", "online": False, "samples_log_interval": 1},
}
Event = tuple[str, float, int]
"""Name, value, samples seen: as in step/monitor.py."""


def main(tracker: str) -> None:
    """A job whose DeepSpeed JSON switches a service on; prints what the monitor was told."""
    from launch import distributed
    from tests.training import Case, engine_for, train_window

    distributed.join()
    case = Case(world=1, accumulation=2, updates=5, k=2, base="SGD", config={tracker: TRACKERS[tracker]})
    told = []
    with engine_for(case) as engine:
        write = engine.monitor.write_events

        def listen(events: list[Event]) -> None:
            told.extend(event for event in events if event[0].startswith(PREFIX))
            write(events)

        engine.monitor.write_events = listen
        for update in range(case.updates):
            train_window(engine, case, update)
    print("told:", json.dumps(told))
    distributed.leave()


def comet(folder: Path) -> Iterator[Event]:
    """What is in the archive of an offline experiment."""
    [path] = folder.glob("*.zip")
    for line in zipfile.ZipFile(path).read("messages.json").splitlines():
        metric = json.loads(line).get("payload", {}).get("metric")
        if metric:
            yield metric["metricName"], float(metric["metricValue"]), int(metric["step"])


def wandb(folder: Path) -> Iterator[Event]:
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
                yield item.key or ".".join(item.nested_key), float(json.loads(item.value_json)), history.step.num


@pytest.mark.grid  # a service of its own is started; what monitors are told is in test_metrics.py
@pytest.mark.parametrize(("tracker", "package", "read"), [("wandb", "wandb", wandb), ("comet", "comet_ml", comet)])
def test_the_service_keeps_what_it_is_told(tracker: str, package: str, read: Any, tmp_path: Path) -> None:
    """In a process of its own: these packages start services and hook into others when they are imported."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                                "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path),
                                "COMET_OFFLINE_DIRECTORY": str(tmp_path)}
    # Into a file: the service process that wandb starts keeps a pipe open when the job is over.
    output = tmp_path / "output"
    with output.open("w") as file:
        job = subprocess.run([sys.executable, "-m", "tests.test_trackers", tracker], cwd=tmp_path, env=environment,
                             stdout=file, stderr=file, timeout=240)
    assert job.returncode == 0, output.read_text()
    [told] = [json.loads(line[6:]) for line in output.read_text().splitlines() if line.startswith("told: ")]
    kept = [event for event in read(tmp_path) if event[0].startswith(PREFIX)]
    names = {name.removeprefix(PREFIX) for name, *_ in kept}
    assert {"sharpness", "gradient_norm", "beta", "step_kind", "rho"} <= names
    assert sorted(kept) == sorted(map(tuple, told))  # through JSON and back, exactly; the services keep doubles


if __name__ == "__main__":
    main(*sys.argv[1:])
