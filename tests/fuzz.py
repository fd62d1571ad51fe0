"""Random configurations against the oracle: ``python -m tests.fuzz --draws 300 --seed 0``.

Every draw has a seed of its own, printed with its result; ``--replay SEED`` runs that one again. A draw fails if a
rank's weights are further from the oracle's than rounding explains, or for whatever else check_against_oracle asks.

Tolerance of a draw: FLOOR, for what fp32 arithmetic leaves of an update, plus MARGIN times the distance that the oracle
itself moves when it computes its gradients in the run's dtype. The run rounds in more places than that oracle (the
reduction over ranks and micro-batches, which low precision does in the model's dtype too), but not in MARGIN times as
many. Draws whose tolerance would exceed LIMIT are drawn again: training that turns rounding into another result cannot
be compared. Muon has no tolerance of its own: what Newton-Schulz makes of rounding (tests/test_options.py), it makes of
the oracle's too, in fp32 as well.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .training import DTYPES, Case, compare_with_oracle, distance, run_oracle

FLOOR = 2e-5
"""Twice test_oracle_grid's, for DeepSpeed's CPU Adam, which keeps 1 - beta2 as a float: a relative error of 1.3e-5."""
MARGIN = 8.0
LIMIT = 0.05

CPU = {"device": "cpu"}


@functools.cache
def draw(seed: int) -> tuple[Case, float]:
    """The case of a seed, and its tolerance."""
    for attempt in range(100):
        case = _draw(random.Random(f"{seed}-{attempt}"))
        tolerance = rounding_tolerance(case)
        if tolerance <= LIMIT:
            return case, tolerance
    raise AssertionError(f"no usable case for seed {seed}")


ZERO12: dict[str, list[Any]] = {
    "offload_optimizer": [CPU], "overlap_comm": [True], "round_robin_gradients": [True], "reduce_scatter": [False],
    "use_multi_rank_bucket_allreduce": [False], "reduce_bucket_size": [10, 100, 1000], "contiguous_gradients": [False]}
ZERO3: dict[str, list[Any]] = {
    "offload_optimizer": [CPU], "offload_param": [CPU], "sub_group_size": [10, 100, 1000],
    "stage3_param_persistence_threshold": [0, 20, 10**6], "reduce_scatter": [False], "reduce_bucket_size": [100, 1000],
    "overlap_comm": [True]}
OF_MUON = {1: "offload_optimizer", 2: "offload_optimizer", 3: "reduce_scatter"}
"""What it is refused without, by stage."""


def _draw(choose: random.Random) -> Case:
    stage = choose.choice([0, 1, 2, 3])
    precision = choose.choice(["fp32", "fp32", "bf16", "fp16"])
    base = choose.choice(["AdamW", "AdamW", "SGD", "Adam", "Adagrad", "Lamb", "Lars", "Muon", "Muon"])
    if stage == 0 and base == "Muon":
        precision = "fp32"  # it is refused in the others
    zero = {key: choose.choice(values) for key, values in [{}, ZERO12, ZERO12, ZERO3][stage].items()
            if choose.random() < 0.25 or (base == "Muon" and key == OF_MUON[stage])}
    config: dict[str, Any] = {}
    if precision != "fp32":
        zero.pop("round_robin_gradients", None)  # DeepSpeed's API then shows the wrong fp32 weights
        if stage in (1, 2) and "offload_optimizer" not in zero and choose.random() < 0.3:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if base == "SGD" and "offload_optimizer" in zero:
        config["zero_force_ds_cpu_optimizer"] = False
    options: dict[str, Any] = {}
    if base == "SGD":
        momentum = choose.choice([0.0, 0.9])
        options = {"momentum": momentum, "nesterov": momentum > 0 and choose.random() < 0.5}
    elif base != "Lars":  # with an eps below rounding, Adam's first steps are the sign of a gradient that is all noise
        options = {"eps": choose.choice([1e-4, 1e-3])}
    if base in ("AdamW", "Adam", "Muon"):
        options["betas"] = choose.choice([(0.9, 0.999), (0.8, 0.95)])
    return Case(model=f"random-{choose.randrange(10_000)}", world=choose.choice([1, 2, 2, 2, 4]), stage=stage,
                precision=precision, base=base, options=options, zero=zero, config=config,
                zero_init=stage == 3 and precision == "fp32" and choose.random() < 0.3,
                accumulation=choose.choice([1, 1, 2, 3]), clipping=choose.choice([0.0, 0.0, 0.02, 0.3]),
                k=choose.choice([1, 2, 3, 4, 5]), rho=choose.choice([0.0, 0.02, 0.1, 0.5]),
                alpha=choose.choice(["auto", "auto", 0.0, 0.3, 0.7]), two_groups=choose.random() < 0.5,
                layer_scale=choose.choice([None, None, None, "norm", "gradient"]),
                loss_scale=8.0 if stage == 0 else 128.0, updates=choose.randint(4, 10),
                micro_batch=choose.randint(1, 6), seed=choose.randrange(10_000))


def rounding_tolerance(case: Case) -> float:
    """Of a case, as the module's docstring says.

    LAMB moves a tensor of one element by lr |w| whatever the size of its update, so only the sign of that counts. In
    low precision rounding may turn one that is near 0, in the run and not in the oracle: two such steps, of ‖w‖.
    """
    _, exact = run_oracle(case)
    _, rounded = run_oracle(case, DTYPES[case.precision])
    tolerance = FLOOR + MARGIN * distance(rounded, exact)
    if case.base != "Lamb" or case.precision == "fp32":
        return tolerance
    single = max((float(w.abs()) for w in exact.values() if w.numel() == 1), default=0.0)
    norm = float(torch.cat([w.reshape(-1) for w in exact.values()]).norm())
    return tolerance + 2 * case.base_params["lr"] * single / norm


def check_draw(seed: int) -> str:
    """Run one draw, and say what it was."""
    case, tolerance = draw(seed)
    _, error, _ = compare_with_oracle(case)
    assert error <= tolerance, f"seed {seed}: relative error {error:.1e} > {tolerance:.1e} for {case}"
    return f"error {error:.1e}, tolerance {tolerance:.1e}, {case}"


def seeds(draws: int, seed: int) -> Iterator[int]:
    """Of the draws of one run."""
    yield from (1_000_000 * seed + i for i in range(draws))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, help="run the draw of this seed only")
    options = parser.parse_args(arguments)
    todo = [options.replay] if options.replay is not None else list(seeds(options.draws, options.seed))
    failed, start = [], time.monotonic()
    for seed in sorted(todo, key=lambda s: draw(s)[0].world):  # starting rank processes is the slow part
        try:
            print(f"ok {seed}: {check_draw(seed)}", flush=True)
        except Exception as problem:
            failed.append(seed)
            print(f"FAILED {seed}: {draw(seed)[0]}\n{type(problem).__name__}: {problem}", flush=True)
    print(f"{len(todo)} draws in {time.monotonic() - start:.0f} s, {len(failed)} failed {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
