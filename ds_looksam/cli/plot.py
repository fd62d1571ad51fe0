"""Draw runs of launch/train.py side by side: loss and accuracy over updates, gradient evaluations and training time.

The three axes answer three questions: a SAM step costs two evaluations, so a run with LookSAM is to be compared with
its base at equal evaluations or at equal time, not only at equal updates.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import LookSAMError

Row = dict[str, str]
"""A line of metrics.csv, by column: see ``Row`` in launch/report.py."""

AXES: dict[str, Callable[[Row], float]] = {
    "updates": lambda row: int(row["update"]),
    "gradient evaluations": lambda row: int(row["evaluations"]),
    "minutes of training": lambda row: float(row["seconds"]) / 60,
}
QUANTITIES = ("loss", "accuracy")
NEEDED = {"split", "update", "evaluations", "seconds", *QUANTITIES}


class PlotError(LookSAMError):
    """There is nothing to draw, or nothing to draw it with."""


def run(runs: Sequence[Path], out: Path) -> int:
    draw({name: read(path) for name, path in _names(runs).items()}, out)
    print(out)
    return 0


def read_rows(path: Path) -> list[Row]:
    """The lines of a metrics.csv, but for one that a full disk has cut off."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def read(run: Path) -> list[Row]:
    """The rows of one run, a folder or the file itself. Raises PlotError: there is no metrics.csv, or it is not one of
    launch/train.py's."""
    path = run / "metrics.csv" if run.is_dir() else run
    if not path.is_file():
        raise PlotError(f"{path} is not there: give the folder of a run of launch/train.py, or its metrics.csv")
    rows = read_rows(path)
    if not rows:
        raise PlotError(f"{path} has no rows yet")
    missing = sorted(NEEDED - rows[0].keys())
    if missing:
        raise PlotError(f"{path} has no column {', '.join(missing)}; it is not a metrics.csv of launch/train.py")
    return rows


def draw(runs: dict[str, list[Row]], png: Path, title: str = "") -> None:
    """Every run's training curve (faint) and test results (dots), one column of panels per axis. PlotError where
    matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError('drawing needs matplotlib: pip install "ds_looksam[plot]"') from error
    figure = Figure(figsize=(5 * len(AXES), 4 * len(QUANTITIES)), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display, whatever MPLBACKEND says
    figure.suptitle(title)
    panels = figure.subplots(len(QUANTITIES), len(AXES), sharey="row", squeeze=False)
    for quantity, panels_of_quantity in zip(QUANTITIES, panels, strict=True):
        for (label, x), axes in zip(AXES.items(), panels_of_quantity, strict=True):
            for i, (name, rows) in enumerate(runs.items()):
                styles: dict[str, dict[str, Any]] = {"train": {"alpha": 0.4}, "test": {"marker": "o"}}
                for split, style in styles.items():
                    points = [(x(row), float(row[quantity])) for row in rows if row["split"] == split]
                    axes.plot(*zip(*points, strict=True), color=f"C{i}", label=f"{name}, {split}", **style)
            axes.set(xlabel=label, ylabel=quantity)
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Each run by its folder's name, or by the whole path where two would have the same."""
    short = [(path if path.is_dir() or path.suffix != ".csv" else path.parent).name for path in folders]
    return {name if name and short.count(name) == 1 else str(path): path
            for name, path in zip(short, folders, strict=True)}
