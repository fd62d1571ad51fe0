"""What a run leaves behind for people: a progress bar, metrics.csv and metrics.png."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm


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
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._file.flush()

    def write(self, row: Row) -> None:
        if self._file is not None:
            self._writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value
                                   for key, value in asdict(row).items()})
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
            print(line, flush=True)
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def plot(metrics: Path, png: Path, title: str) -> None:
    """Loss and accuracy of metrics.csv over the updates, training and test, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = read_rows(metrics)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(title)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, style in ("train", {"alpha": 0.6}), ("test", {"marker": "o"}):
            chosen = [row for row in rows if row["split"] == split]
            updates, values = [int(row["update"]) for row in chosen], [float(row[quantity]) for row in chosen]
            axes.plot(updates, values, label=split, **style)
        axes.set(xlabel="updates", ylabel=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
        _add_minutes(axes, rows)
    figure.savefig(png, dpi=120)


def _add_minutes(axes: Any, rows: list[dict[str, str]]) -> None:
    """A second axis on top: minutes of training."""
    last = rows[-1] if rows else None
    if last is None or not int(last["update"]):
        return
    minutes = float(last["seconds"]) / 60 / int(last["update"])
    if minutes > 0:
        top = axes.secondary_xaxis("top", functions=(lambda update: update * minutes, lambda time: time / minutes))
        top.set_xlabel("minutes of training")
