"""Where an update's time goes: the parts of reuse and SAM steps, and a base step beside them. Prints Markdown.

    python -m benchmarks.parts --model nano/7 --micro-batch 1 --stage 0 1 2 3                       # on a CPU
    python -m benchmarks.parts --model B/16 --image 224 --classes 1000 --precision bf16 --micro-batch 256 --stage 0 3

One process, k = 2. The device is waited for before and after each part, so the parts of an update add up to more than
an update takes; parts within a part are indented. *Launches* are the kernels, copies and fills that the host hands to
a GPU, of one update, counted by torch.profiler; on a CPU operators are counted instead.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import step_time
from tests import inside

MARK = "part: "


@dataclass
class Call:
    """One call of a part: how deep inside others, what, and how long on the wall and in this process's CPU time."""

    depth: int
    name: str
    seconds: step_time.Seconds = (0.0, 0.0)


def now() -> step_time.Seconds:
    """When the device has done all that it was given."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()
    return time.perf_counter(), time.process_time()


class Parts:
    """Takes the times of functions that it is put around."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._depth = 0

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            call = Call(self._depth, name)
            self.calls.append(call)
            self._depth += 1
            start = now()
            try:
                with record_function(f"{MARK}{len(self.calls)}"):
                    return function(*args, **kwargs)
            finally:
                end = now()
                call.seconds = end[0] - start[0], end[1] - start[1]
                self._depth -= 1
        return timed

    def put_around(self, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, self.around(name.strip("_"), getattr(owner, name)))

    def put_around_engine(self, engine: Any) -> None:
        """What LookSAM's step calls on the engine and its shards."""
        shards = inside.shards(engine)
        self.put_around(engine, "_take_model_step")
        self.put_around(inside.ascent(engine), "norms", "perturb", "restore")
        self.put_around(inside.replay(engine), "evaluate", "_forward_again", "_backward_again")
        self.put_around(inside.state(engine), "keep")
        self.put_around(shards, "take_gradient", "give_gradient", "perturb_weights", "unperturb_local", "end_window",
                        "layer_squares", "tell_squared_norm", "keep_gradient")
        shards.passes = replace(shards.passes, **{
            name: self.around(name, getattr(shards.passes, name))
            for name in ("add_reused_", "replay_sums", "project_out_")})


def updates(contender: step_time.Contender, data: list[Any], parts: Parts, number: int) -> list[tuple[str, list[Call]]]:
    """The kind of each of so many updates, and what it called."""
    engine, found = contender.engine, []
    for _ in range(number):
        parts.calls = []
        for inputs in data:
            loss = parts.around("forward", lambda inputs=inputs: engine(**inputs).loss)()
            parts.around("backward", engine.backward)(loss)
            parts.around("step", engine.step)()
        found.append((contender.kind(), parts.calls))
    return found


def launches(contender: step_time.Contender, data: list[Any], parts: Parts, on_gpu: bool) -> list[int]:
    """For each call of the next update, in the order in which they began, how much was handed to the device in it."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        updates(contender, data, parts, 1)
    wanted = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset") if on_gpu else ("aten::", )
    handed_over: list[float] = []
    ranges: dict[str, tuple[float, float]] = {}
    for event in profiler.events():
        times = event.time_range.start, event.time_range.end
        if event.name.startswith(wanted):
            handed_over.append(times[0])
        elif event.name.startswith(MARK):  # a GPU shows it once more, later
            ranges[event.name] = min(ranges.get(event.name, times), times)
    return [sum(start <= time <= end for time in handed_over)
            for start, end in (ranges[f"{MARK}{i + 1}"] for i in range(len(parts.calls)))]


def table(title: str, found: list[list[Call]], counted: list[int], on_gpu: bool) -> str:
    lines = [f"| {title} | ms | of CPU time | {'launches' if on_gpu else 'operators'} |", "|---|---|---|---|"]
    for column, count in zip(zip(*found, strict=True), counted, strict=True):
        wall, cpu = (1e3 * median(call.seconds[clock] for call in column) for clock in (0, 1))
        lines.append(f"| {'- ' * column[0].depth}{column[0].name} | {wall:.2f} | {cpu:.2f} | {count} |")
    return "\n".join(lines)


def print_tables(title: str, contender: step_time.Contender, data: list[Any], parts: Parts, number: int) -> None:
    """One for each kind of update, of so many updates."""
    on_gpu = contender.engine.device.type != "cpu"
    updates(contender, data, parts, 6)  # warm
    found = updates(contender, data, parts, number)
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    for kind in kinds:
        while contender.kind() == kind and len(kinds) > 1:  # so that the next one is of this kind
            updates(contender, data, parts, 1)
        counted = launches(contender, data, parts, on_gpu)
        calls = [calls for of_kind, calls in found if of_kind == kind]
        print(table(f"{title}, {kind}", calls, counted, on_gpu), end="\n\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step_time.add_training_arguments(parser)
    parser.add_argument("--stage", type=int, nargs="+", default=[2], choices=[0, 1, 2, 3])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=["base", "LookSAM"], choices=list(step_time.CONTENDERS))
    args = parser.parse_args()
    args.channels = args.channels or step_time.default_channels(args.image)
    args.k, args.accumulation = 2, 1
    step_time.launch("benchmarks.parts", ranks=1)
    import deepspeed
    from distributed import leave

    from ds_looksam.replay.snapshot import ModelSnapshot

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed()
    for stage in args.stage:
        for name in args.only:
            contender = step_time.build(args, stage, args.precision, name)
            data = [step_time.batch(args, contender.engine.device, args.precision, seed=0)]
            parts = Parts()
            if name == "base":
                parts.put_around(contender.engine, "_take_model_step")
            else:
                parts.put_around_engine(contender.engine)
            # A class attribute: the next engine's calls are not this one's.
            with patch.object(ModelSnapshot, "__init__", parts.around("ModelSnapshot", ModelSnapshot.__init__)):
                print_tables(f"stage {stage}, {name}", contender, data, parts, args.updates)
            contender.engine.destroy()
            del contender, data
    leave()


if __name__ == "__main__":
    main()
