"""Tables and the picture of benchmarks/evidence.py, from its records alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.evidence_methods import METHODS
from benchmarks.evidence_plan import TUNING_SEED, Record, tuned
from benchmarks.evidence_tasks import TASKS, Task

BEGIN, END = "<!-- python -m benchmarks.evidence table --write -->", "<!-- end of what it wrote -->"

# Student's t, 97.5 %, for 1 to 30 degrees of freedom; beyond, the normal distribution's with its first correction.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


class Row(NamedTuple):
    """What is one line of a table: a method, on so many ranks, with one lr and rho."""

    method: str
    world: int
    lr: float
    rho: float | None


Runs = dict[int, Record]
"""By seed."""


def t_quantile(freedom: int) -> float:
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t); n of at least 2."""
    return mean(differences), t_quantile(len(differences) - 1) * stdev(differences) / len(differences)**0.5


def final(records: list[Record]) -> dict[str, dict[Row, Runs]]:
    """All but the tuning runs, by task, in the order of the catalogues."""
    found: dict[str, dict[Row, Runs]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        if not r["tuning"]:
            found[r["task"]][Row(r["method"], r["world"], r["lr"], r["rho"])][r["seed"]] = r
    methods = list(METHODS)
    return {task: dict(sorted(found[task].items(), key=lambda item: (methods.index(item[0].method), str(item[0]))))
            for task in TASKS if task in found}


def difference(rows: dict[Row, Runs], row: Row, other: str) -> str:
    """Over the seeds that both have: the seed fixes initialisation and order of the data, on any number of ranks.

    "±": the 95 % interval. Of several lines of the other method, one on as many ranks, and the one with most seeds.
    """
    twins = [runs for r, runs in rows.items() if r.method == other and r.world == row.world]
    twins = twins or [runs for r, runs in rows.items() if r.method == other]
    if not other or other == row.method or not twins:
        return ""
    twin = max(twins, key=len)
    ours = rows[row]
    values = [ours[seed]["score"] - twin[seed]["score"] for seed in sorted(ours.keys() & twin.keys())]
    digits = TASKS[next(iter(ours.values()))["task"]].digits
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.{digits}f} (n 1)"
    middle, half = interval(values)
    n = "" if len(values) == len(ours) else f" (n {len(values)})"
    return f"{middle:+.{digits}f} ± {half:.{digits}f}{n}"


def comparison(records: list[Record], method: str, *others: str) -> str:
    """``method`` minus each of ``others``, in every task that has both."""
    return "\n".join(f"{task}: {row.method} - {other}: {value}" for task, rows in final(records).items()
                     for row in rows if row.method == method
                     for other in others if (value := difference(rows, row, other)))


def tables(records: list[Record]) -> str:
    return "\n\n".join([*(task_table(TASKS[task], rows) for task, rows in final(records).items()),
                        tuning_table(records)])


def _machine(record: Record) -> str:
    at_once = "one run at a time" if record["side_by_side"] == 1 else f"{record['side_by_side']} runs side by side"
    return f"{record['device']}, {at_once}, torch {record['torch']}"


def timed(rows: dict[Row, Runs]) -> dict[Row, list[Record]]:
    """Of each line the runs whose seconds can be compared: those on the machine on which most of all were made."""
    most, _ = machines(rows)[0]
    return {row: [r for r in by_seed.values() if _machine(r) == most] for row, by_seed in rows.items()}


def machines(rows: dict[Row, Runs]) -> list[tuple[str, int]]:
    """With the number of runs made there, most first."""
    return Counter(_machine(r) for by_seed in rows.values() for r in by_seed.values()).most_common()


def task_table(task: Task, rows: dict[Row, Runs]) -> str:
    digits, clocked = task.digits, timed(rows)
    lines = [f"### {task.name}: {task.about}", "",
             f"{task.base}, batch {task.batch}; {task.metric}.", "",
             f"| | evaluations | seconds | m | lr, rho | n | mean (sd) | minus {task.base} | minus SAM at every k-th | "
             "cosine of g_v | loss rise | eigenvalue |", "|" + "---|" * 12]
    for row, by_seed in rows.items():
        runs = list(by_seed.values())
        scores = [r["score"] for r in runs]
        spread = f" ({stdev(scores):.{digits}f})" if len(scores) > 1 else ""
        cosines = [c for r in runs for *_, c, _ in r["points"] if c is not None]
        method = METHODS[row.method]
        name = task.base + row.method[4:] if method.type == "base" else row.method
        lines.append(" | ".join([
            f"| {name}{f', {row.world} ranks' if row.world > 1 else ''}",
            f"{mean(r['evaluations'] for r in runs):,.0f}",
            f"{mean(r['seconds'] for r in clocked[row]):.0f}" if clocked[row] else "",
            str(runs[0]["m"] or ""),
            f"{row.lr:.2g}" + (f", {row.rho:g}" if row.rho is not None else ""), str(len(runs)),
            f"{mean(scores):.{digits}f}{spread}", difference(rows, row, "base"),
            difference(rows, row, method.every_kth),
            f"{mean(cosines):.2f}" if cosines else "", f"{mean(r['loss_rise'] for r in runs):.3f}",
            f"{mean(r['eigenvalue'] for r in runs):.1f}"]) + " |")
    made_on = machines(rows)
    several = f" ({made_on[0][1]} runs, whose seconds these are)" if len(made_on) > 1 else ""
    rest = "".join(f"; {machine} ({n} runs)" for machine, n in made_on[1:])
    return "\n".join([*lines, "", f"{made_on[0][0]}{several}{rest}."])


def tuning_table(records: list[Record]) -> str:
    """What the grid was, and what was chosen."""
    lines = [f"### Tuning: seed {TUNING_SEED}", "",
             "Every lr with every rho; the seed is used for nothing else.", "",
             "| task | method | updates | lr tried | rho tried | lr | rho | score | worst and best |", "|" + "---|" * 9]
    runs: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
    for r in records:
        if r["tuning"]:
            runs[r["task"], r["method"], r["world"]].append(r)
    tasks, methods = list(TASKS), list(METHODS)
    for (name, method, world), done in sorted(
            runs.items(), key=lambda item: (tasks.index(item[0][0]), methods.index(item[0][1]), item[0][2])):
        task, best = TASKS[name], tuned(records, name, method, world)
        grid = task.lrs, task.rhos if METHODS[method].has_rho else ()
        tried = [", ".join(f"{x:g}" for x in values) for values in grid]
        scores = sorted((r["score"] for r in done), reverse=not task.more_is_better)
        chosen = "not all of the grid was run | | |" if best is None else (
            f"{best['lr']:g} | {best['rho'] or ''} | {best['score']:.{task.digits}f} | "
            f"{scores[0]:.{task.digits}f} to {scores[-1]:.{task.digits}f} |")
        lines.append(f"| {name} | {method} | {done[0]['updates']} | {' | '.join(tried)} | {chosen}")
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Between the page's markers.

    Raises:
        ValueError: the page does not have them, once each and in this order.
    """
    whole = page.read_text()
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must have the lines {BEGIN} and {END}, in this order")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


DRAWN = ["base", "base-x1.2", "MSAM", "SAM", "SAM/micro_batch", "SAM-5", "SAM-5/micro_batch", "LookSAM-5",
         "LookSAM-5/micro_batch", "Look-LayerSAM-5", "Look-LayerSAM-5/micro_batch"]
"""A picture of all would show nothing. Colour is the method, dashes are perturbations of small groups."""
_COLOURS = {"base": "black", "base-x1.2": "grey", "MSAM": "C5", "SAM": "C0", "SAM-5": "C2", "LookSAM-5": "C3",
            "Look-LayerSAM-5": "C4"}


def _style(method: str) -> dict[str, Any]:
    plain, _, ascent = method.partition("/")
    return {"color": _COLOURS[plain], "linestyle": "--" if ascent else "-", "linewidth": 1.5,
            "label": method.replace("base", "base optimizer")}


IN_SHORT = ["5k-wrong-whole", *(task for task in TASKS if task.startswith("batch-"))]
"""What the README's picture shows."""


def draw(records: list[Record], png: Path, tasks: Collection[str]) -> None:
    """A line of panels a task: score over evaluations, and over seconds of training; then accuracy over batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {task: rows for task, rows in final(records).items() if task in tasks}
    curves = [task for task in found if not task.startswith("batch-")]
    sweeps = sorted({TASKS[task].base for task in found if task.startswith("batch-")})
    height = len(curves) + bool(sweeps)
    figure = Figure(figsize=(13, 4 * height), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    panels = figure.subplots(height, 2, squeeze=False)
    for task, (left, right) in zip(curves, panels, strict=False):
        all_runs = {row: list(by_seed.values()) for row, by_seed in found[task].items()}
        for axes, column, label, drawn in ((left, 1, "gradient evaluations", all_runs),
                                           (right, 2, "seconds of training", timed(found[task]))):
            for row, runs in drawn.items():
                if row.method in DRAWN and row.world == 1 and runs:
                    points = _mean_points(runs)
                    axes.plot([p[column] for p in points], [p[3] for p in points], marker=".", **_style(row.method))
            _finish(axes, f"{task}: {TASKS[task].about}", label, TASKS[task].metric)
            _look_at_the_end(axes, TASKS[task].more_is_better)
    for base, axes in zip(sweeps, panels[-1], strict=False):
        lines: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
        for task in (task for task in found if task.startswith(f"batch-{base}-")):
            for row, by_seed in found[task].items():
                scores = [r["score"] for r in by_seed.values()]
                if row.method in DRAWN and row.world == 1:
                    spread = stdev(scores) if len(scores) > 1 else 0.0
                    lines[row.method].append((TASKS[task].batch, mean(scores), spread))
        for method, values in lines.items():
            batch, score, error = zip(*sorted(values), strict=True)
            axes.errorbar(batch, score, yerr=error, marker="o", capsize=3, **_style(method))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _finish(axes, f"60,000 images, 10 epochs, {base}", "batch size", "test accuracy, %")
    if len(sweeps) == 1:
        panels[-1][1].axis("off")
    for left, right in panels:
        handles = {label: handle for axes in (left, right)
                   for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        right.legend(handles.values(), handles.keys(), fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=100)


def _mean_points(runs: list[Record]) -> list[list[float]]:
    """The test points of one method, averaged over seeds."""
    take: Callable[[list[list[float]]], list[float]] = lambda group: [mean(p[i] for p in group) for i in range(4)]  # noqa: E731
    return [take(list(group)) for group in zip(*(r["points"] for r in runs), strict=True)]


def _look_at_the_end(axes: Any, more_is_better: bool) -> None:
    """The last two thirds of the curves decide; their first points would flatten them."""
    values = [y for line in axes.lines for y in line.get_ydata()[len(line.get_ydata()) // 3:]]
    if values and max(values) > min(values):
        margin = 0.1 * (max(values) - min(values))
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
