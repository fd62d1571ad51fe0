"""What a run leaves behind for people: a progress bar, metrics.csv and metrics.png."""

from __future__ import annotations

import csv
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_looksam.checkpoint.files import write_atomically
from ds_looksam.cli.plot import draw, read_rows


@dataclass(frozen=True)
class Row:
    """One line of metrics.csv.

    Attributes:
        split: "train" (means over the updates since the last such line) or "test" (the whole test set).
        update: updates so far; ``evaluations`` gradient evaluations, a SAM step counts two.
        seconds: spent training, evaluation of the test set left out.
        images_per_second: training images over those seconds; empty for "test".
        step_kind: of this update: sam, reuse, base or skipped; empty for "test".
    """

    split: str
    epoch: float
    update: int
    evaluations: int
    seconds: float
    loss: float
    accuracy: float
    lr: float
    images_per_second: float | None = None
    step_kind: str = ""


COLUMNS = [field.name for field in fields(Row)]


class RunLog:
    """Rows to ``path`` as they come. Only rank 0 has one that writes; ``path`` None makes one that does not."""

    def __init__(self, path: Path | None, resume_at: int) -> None:
        """Start the file, or go on with it, leaving out what a run wrote after update ``resume_at`` before it ended."""
        self._file = None
        if path is None:
            return
        before = read_rows(path) if resume_at and path.exists() else []
        kept = [row for row in before if int(row["update"]) <= resume_at]

        def begin(file: Path) -> None:
            with file.open("w", newline="") as opened:
                writer = csv.DictWriter(opened, COLUMNS)
                writer.writeheader()
                writer.writerows(kept)

        write_atomically(path, begin)  # what a run of days has measured must not be lost with this process
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def write(self, row: Row) -> None:
        if self._file is not None:
            self._writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value
                                   for key, value in asdict(row).items()})
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def say(line: str) -> None:
    """Print, also where nobody reads it any more: a terminal that is gone is no reason to end a run."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails


class Progress:
    """A bar over all updates of the run, on rank 0. Where there is no terminal it prints a line now and then."""

    def __init__(self, shown: bool, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, disable=not shown, unit="update", dynamic_ncols=True,
                         mininterval=0.2 if sys.stderr.isatty() else 20)
        self._facts: dict[str, Any] = {}

    def update(self, step_kind: str) -> None:
        self._facts["step"] = step_kind
        self._bar.set_postfix(self._facts, refresh=False)
        self._bar.update()

    def set(self, row: Row) -> None:
        self._facts.update(loss=f"{row.loss:.3f}", acc=f"{row.accuracy:.3f}", img_s=f"{row.images_per_second or 0:.0f}")

    def say(self, line: str) -> None:
        """A line of its own above the bar."""
        if not self._bar.disable:
            self._bar.clear()
            say(line)
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def plot(metrics: Path, png: Path, title: str) -> None:
    """Loss and accuracy of metrics.csv as a PNG: what ``ds-looksam plot`` draws of several runs."""
    draw({png.parent.name: read_rows(metrics)}, png, title)
