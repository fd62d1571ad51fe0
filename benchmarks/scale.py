"""A step of LookSAM as rank 0 of 1 to 4,096 ranks, in one process. Prints Markdown.

    python -m benchmarks.scale                                       # ViT-B/16, stages 0 to 3
    python -m benchmarks.scale --model gpt-1.3b --world 64 4096 --stage 1 2 3
    python -m benchmarks.scale --ascent rank

Real DeepSpeed engines on torch's fake process group (:mod:`benchmarks.one_of_many`), bf16, on a CPU. One process per
row and engine, so that nothing is shared. What grows with the world size is printed beside the formula that explains
it, and the program fails where the two differ:

- bytes and number of the collectives: exactly;
- tensors that stay between updates, and while a SAM step's second evaluation runs: within 2 %;
- the map of segments, built by layer-wise runs and checkpoints: no more segments than tensors.

Times are CPU seconds of this process on one thread, without what the stand-in for the network takes, so that a busy
machine does not change them much. Start-up and evaluation are DeepSpeed's, with and without LookSAM; its Python loops
over ranks x tensors show there.

What this cannot show: how long a collective takes, waiting for slow ranks, and how a GPU would overlap any of it. For
that see :mod:`benchmarks.cluster_model`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from benchmarks import scale_formulas
from benchmarks.scale_models import MODELING, MODELS, Batch
from ds_looksam.config.params import ASCENTS, OWN
from tests.collectives import Collective
from tests.costs import tensor_bytes
from tests.inside import shards as shards_of

WORLDS = (1, 8, 64, 512, 4096)
STAGES = (0, 1, 2, 3)
MEMORY_LIMIT = 14e9
"""Bytes: configurations that need more in one process are left out, and said so."""

# One engine, measured -------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A window: ``evaluation`` is the user's forward and backward, ``update`` is engine.step(), which on a SAM step
    has another evaluation inside. CPU seconds, and ``lines`` of ds_looksam's Python in step() (0: not counted)."""

    kind: str
    evaluation: list[Collective]
    update: list[Collective]
    evaluation_seconds: float
    update_seconds: float
    lines: int = 0


@dataclass
class Measured:
    """An engine on rank 0: CPU seconds of deepspeed.initialize, the last step of each kind, bytes of tensors after an
    update and during the last forward; with LookSAM the segment map: seconds, lines, segments."""

    startup_seconds: float
    startup: list[Collective]
    steps: dict[str, Step]
    after: int
    during: int
    sizes: tuple[list[int], list[int]]
    map_seconds: float = 0.0
    map_lines: int = 0
    segments: int = 0


def measure(model: str, stage: int, world: int, looksam: bool, count_lines: bool = False,
            ascent: str = "global") -> Measured:
    """In a process of its own."""
    from benchmarks.one_of_many import OneOfMany

    gc.freeze()  # what the imports made: looking for tensors among it takes longer than everything else here
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ranks = OneOfMany(world)
    import deepspeed

    import ds_looksam  # noqa: F401 - registers LookSAM

    torch.manual_seed(0)
    made = MODELS[model]()
    module, batch, sizes = made.build(), made.batch(), made.sizes()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **scale_formulas.ZERO[stage]},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "LookSAM" if looksam else "AdamW",
                      "params": {"lr": 1e-5, "torch_adam": True,
                                 **({"k": 2, "alpha": 0.7, "ascent": ascent} if looksam else {})}},
    }
    start = time.process_time()
    with ranks.listen() as startup:
        engine, *_ = deepspeed.initialize(model=module, config=config, model_parameters=module.parameters(),
                                          dist_init_required=False)
    measured = Measured(time.process_time() - start - startup.seconds, startup.collectives, {}, 0, 0, sizes)
    if looksam:
        _measure_map(engine, measured)

    probe = Probe(engine.module)
    updates = 4 if looksam else 3  # stage 3 records its trace in the first; with k = 2 every other is a SAM step
    for update in range(updates):
        probe.on = update == 2
        step = _train(engine, batch, ranks, probe)
        measured.steps[step.kind] = step
        if probe.on:
            measured.after, measured.during = tensor_bytes(), probe.nbytes
            probe.on = False
    for _ in range(2 if count_lines else 0):
        counted = _train(engine, batch, ranks, probe, count_lines=True)
        measured.steps[counted.kind].lines = counted.lines
    return measured


class Probe:
    """Bytes of all tensors when the model's last layer was last entered; and the CPU seconds that looking took."""

    def __init__(self, module: nn.Module) -> None:
        self.on, self.nbytes, self.seconds = False, 0, 0.0
        leaves = [m for m in module.modules() if not list(m.children()) and list(m.parameters())]
        leaves[-1].register_forward_pre_hook(self._look)

    def _look(self, *_: Any) -> None:
        if self.on:
            start = time.process_time()
            self.nbytes = tensor_bytes()
            self.seconds += time.process_time() - start


def _train(engine: Any, batch: Batch, ranks: Any, probe: Probe, count_lines: bool = False) -> Step:
    def clock() -> float:
        return time.process_time() - probe.seconds

    start = clock()
    with ranks.listen() as evaluation:
        engine.backward(engine(**batch).loss)
    middle = clock()
    with ranks.listen() as update:
        lines = lines_of_package(engine.step) if count_lines else engine.step() or 0
    end = clock()
    kind = engine.looksam.step_kind if hasattr(engine, "looksam") else "base"
    return Step(kind, evaluation.collectives, update.collectives, middle - start - evaluation.seconds,
                end - middle - update.seconds, lines)


def _measure_map(engine: Any, measured: Measured) -> None:
    """Of what layer-wise runs and checkpoints build once."""
    shards = shards_of(engine)
    measured.segments = sum(map(len, shards.layout()))
    vars(shards).pop("layers", None)  # built anew when it is next asked for
    start = time.process_time()
    assert shards.layers.count
    measured.map_seconds = time.process_time() - start
    del shards.layers
    measured.map_lines = lines_of_package(lambda: shards.layers)


def lines_of_package(function: Callable[[], Any]) -> int:
    """How many lines of ds_looksam's Python a call runs: a measure of its work that no other process disturbs."""
    import ds_looksam

    package, count = str(Path(ds_looksam.__file__).parent), 0

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(package) else None

    sys.settrace(on_call)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One configuration, with LookSAM and without."""

    model: str
    stage: int
    world: int
    base: Measured
    ours: Measured
    ascent: str = "global"

    @property
    def formulas(self) -> scale_formulas.Formulas:
        return scale_formulas.Formulas(self.stage, self.world, *self.base.sizes, self.ascent)

    def extra(self, kind: str) -> Counter[Collective]:
        """What a step of ours sends beside a base step and, if it is a SAM step, beside an evaluation."""
        base, step = self.base.steps["base"], self.ours.steps[kind]
        sent = Counter(step.evaluation + step.update)
        sent.subtract(base.evaluation + base.update + (base.evaluation if kind == "sam" else []))
        return +sent if min(sent.values(), default=0) >= 0 else Counter({Collective("less than the base", 0, 0): 1})

    def problems(self) -> list[str]:
        """Where measured and formula differ."""
        expected, found = self.formulas, []

        def same(what: str, measured: Any, formula: Any) -> None:
            if measured != formula:
                found.append(f"{what}: {measured} measured, {formula} by the formula")

        def close(what: str, measured: float, formula: float) -> None:
            if abs(measured - formula) > 0.02 * formula + scale_formulas.SMALL_THINGS:
                found.append(f"{what}: {measured} measured, {formula:.0f} by the formula")

        base = self.base.steps["base"]
        same("bytes of a base evaluation", scale_formulas.bulk(base.evaluation), expected.evaluation())
        same("bytes of a base update", scale_formulas.bulk(base.update), expected.update())
        same("a reuse step adds", dict(self.extra("reuse")), dict(expected.reuse_adds()))
        same("a SAM step adds beside an evaluation", dict(self.extra("sam")),
             dict(expected.sam_adds(base.update)))
        close("bytes kept between updates", self.ours.after - self.base.after, expected.persistent())
        close("bytes in a replay", self.ours.during - self.base.during, expected.replay())
        if self.ours.segments > len(self.base.sizes[0]):
            found.append(f"{self.ours.segments} segments for {len(self.base.sizes[0])} tensors")
        return [f"{self.model}, stage {self.stage}, {self.world} ranks: {problem}" for problem in found]

    def sizes(self) -> list[str]:
        """The cells below SIZES."""
        base, added, expected = self.base.steps["base"], self.extra("sam"), self.formulas
        kept, replay = self.ours.after - self.base.after, self.ours.during - self.base.during
        return [str(self.stage), f"{self.world:,}", f"{len(base.evaluation)} + {len(base.update)}",
                f"{sum(self.extra('reuse').values())}", f"{sum(added.values())}",
                f"{_megabytes(added)}", f"{_megabytes(expected.sam_adds(base.update))}",
                f"{kept / 1e6:,.2f}", f"{expected.persistent() / 1e6:,.2f}",
                f"{replay / 1e6:,.2f}", f"{expected.replay() / 1e6:,.2f}"]

    def times(self) -> list[str]:
        """The cells below TIMES."""
        base, reuse, sam = self.base.steps["base"], self.ours.steps["reuse"], self.ours.steps["sam"]
        return [str(self.stage), f"{self.world:,}", f"{1e3 * base.evaluation_seconds:,.0f}",
                f"{1e3 * base.update_seconds:,.0f}", f"{1e3 * (reuse.update_seconds - base.update_seconds):+,.0f}",
                f"{1e3 * (sam.update_seconds - base.update_seconds - base.evaluation_seconds):+,.0f}",
                f"{1e3 * self.base.startup_seconds:,.0f}",
                f"{1e3 * (self.ours.startup_seconds - self.base.startup_seconds):+,.0f}",
                f"{1e3 * self.ours.map_seconds:.1f}", str(self.ours.segments)]


def _megabytes(collectives: Counter[Collective]) -> str:
    return f"{sum(c.nbytes * n for c, n in collectives.items() if c.nbytes > scale_formulas.SCALARS) / 1e6:,.2f}"


SIZES = ("stage", "ranks", "base: collectives, evaluation + update", "a reuse step adds",
         "a SAM step adds beside an evaluation", "of that bulk, MB", "formula", "kept, MB", "formula",
         "in a replay, MB", "formula")
TIMES = ("stage", "ranks", "base evaluation, CPU ms", "base update", "a reuse step adds",
         "a SAM step adds beside an evaluation", "base start-up", "ours adds", "map of segments", "segments")


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def head(cells: Sequence[str]) -> str:
    return line(cells) + "\n|" + "---|" * len(cells)


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *args).result()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit-b16")
    parser.add_argument("--stage", type=int, nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--world", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--ascent", choices=ASCENTS, default="global",
                        help="\"rank\" and \"micro_batch\" leave stage 3 out")
    parser.add_argument("--json", type=Path, help="write everything that was measured there")
    args = parser.parse_args(argv)
    if args.ascent in OWN:
        args.stage = [stage for stage in args.stage if stage < 3]
    return args


def main() -> None:
    args = parse()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Imported once, before the processes fork. DeepSpeed imports Muon, which imports torch.compile, in initialize().
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["benchmarks.one_of_many", "ds_looksam", "deepspeed.runtime.zero.muon.original_muon", *MODELING])
    print(head(SIZES), flush=True)
    rows, problems = [], []
    sizes = MODELS[args.model]().sizes()
    for stage in args.stage:
        for world in args.world:
            needs = scale_formulas.Formulas(stage, world, *sizes, args.ascent).peak()
            if needs > MEMORY_LIMIT:
                print(f"| {stage} | {world:,} | not run: {needs / 1e9:.0f} GB in one process |", flush=True)
                continue
            base, ours = (in_fresh_process(measure, args.model, stage, world, looksam, args.model == "tiny",
                                          args.ascent)
                          for looksam in (False, True))
            rows.append(Row(args.model, stage, world, base, ours, args.ascent))
            print(line(rows[-1].sizes()), flush=True)
            problems += rows[-1].problems()
            sys.stderr.writelines(f"{problem}\n" for problem in rows[-1].problems())
    print("\n".join(["", head(TIMES), *(line(row.times()) for row in rows)]))
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
