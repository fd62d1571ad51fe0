"""Random configurations against the oracle: ``python -m tests.fuzz --draws 300 --seed 0``.

Every draw has a seed of its own, printed with its result; ``--replay SEED`` runs that one again. A draw fails if a
rank's weights are further from the oracle's than rounding explains, or for whatever else check_against_oracle asks.

Tolerance of a draw: FLOOR, for what fp32 arithmetic leaves of an update, plus MARGIN times the distance that the oracle
itself moves when it computes its gradients in the run's dtype. The run rounds in more places than that oracle (the
reduction over ranks and micro-batches, which low precision does in the model's dtype too), but not in MARGIN times as
many. Draws whose tolerance would exceed LIMIT are drawn again: training that turns rounding into another result cannot
be compared. Muon has no tolerance of its own: what Newton-Schulz makes of rounding (tests/test_muon.py), it makes of
the oracle's too, in fp32 as well.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .oracle import Oracle
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


def _draw(choose: random.Random) -> Case:
    stage = choose.choice([0, 1, 2, 3])
    precision = choose.choice(["fp32", "fp32", "bf16", "fp16"])
    base = choose.choice(["AdamW", "AdamW", "SGD", "Adam", "Adagrad", "Lamb", "Lars", "Muon", "Muon"])
    world = choose.choice([1, 2, 2, 2, 4])
    by_layer = base in ("Lamb", "Lars")
    if stage == 0 and (by_layer or base == "Muon"):
        precision = "fp32"  # these refuse the others
    zero, config, zero_init = _zero_options(choose, stage, precision, muon=base == "Muon")
    offloaded = "offload_optimizer" in zero
    if offloaded:
        if by_layer:
            zero.pop("offload_optimizer")
        elif base == "SGD":
            config["zero_force_ds_cpu_optimizer"] = False
    return Case(model=f"random-{choose.randrange(10_000)}", world=world, stage=stage, precision=precision, base=base,
                accumulation=choose.choice([1, 1, 2, 3]), clipping=choose.choice([0.0, 0.0, 0.02, 0.3]),
                k=choose.choice([1, 2, 3, 4, 5]), rho=choose.choice([0.0, 0.02, 0.1, 0.5]),
                alpha=choose.choice(["auto", "auto", 0.0, 0.3, 0.7]), two_groups=choose.random() < 0.5,
                layer_scale=choose.choice([None, None, None, "norm", "gradient"]),
                loss_scale=8.0 if stage == 0 else 128.0, updates=choose.randint(4, 10),
                micro_batch=choose.randint(1, 6), seed=choose.randrange(10_000), zero_init=zero_init, zero=zero,
                config=config, options=_base_options(choose, base))


def _base_options(choose: random.Random, base: str) -> dict[str, Any]:
    if base == "SGD":
        momentum = choose.choice([0.0, 0.9])
        return {"momentum": momentum, "nesterov": momentum > 0 and choose.random() < 0.5}
    if base == "Lars":
        return {}
    # With an eps below rounding, Adam's first steps are the sign of the gradient, also of one that is all noise.
    options: dict[str, Any] = {"eps": choose.choice([1e-4, 1e-3])}
    if base in ("AdamW", "Adam", "Muon"):
        options["betas"] = choose.choice([(0.9, 0.999), (0.8, 0.95)])
    return options


def _zero_options(choose: random.Random, stage: int, precision: str,
                  muon: bool) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Of the JSON's zero_optimization block and of its top level, and whether the model is built under zero.Init.
    ``muon``: with what Muon is refused without."""
    zero: dict[str, Any] = {}
    config: dict[str, Any] = {}
    zero_init = False

    def maybe(key: str, value: Any, probability: float = 0.25) -> None:
        if choose.random() < probability:
            zero[key] = value

    if stage in (1, 2):
        maybe("offload_optimizer", CPU, 1.0 if muon else 0.25)
        maybe("overlap_comm", True)
        maybe("round_robin_gradients", True)
        maybe("reduce_scatter", False)
        maybe("use_multi_rank_bucket_allreduce", False)
        maybe("reduce_bucket_size", choose.choice([10, 100, 1000]))
        maybe("contiguous_gradients", False)
        if precision != "fp32":
            zero.pop("round_robin_gradients", None)  # DeepSpeed's API then shows the wrong fp32 weights
        if precision != "fp32" and "offload_optimizer" not in zero and choose.random() < 0.3:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if stage == 3:
        maybe("offload_optimizer", CPU)
        maybe("offload_param", CPU)
        maybe("sub_group_size", choose.choice([10, 100, 1000]))
        maybe("stage3_param_persistence_threshold", choose.choice([0, 20, 10**6]))
        maybe("reduce_scatter", False, 1.0 if muon else 0.25)
        maybe("reduce_bucket_size", choose.choice([100, 1000]))
        maybe("overlap_comm", True)
        zero_init = precision == "fp32" and choose.random() < 0.3
    return zero, config, zero_init


def rounding_tolerance(case: Case) -> float:
    """Of a case, as the module's docstring says."""
    _, exact = run_oracle(case)
    _, rounded = run_oracle(case, DTYPES[case.precision])
    return FLOOR + MARGIN * distance(rounded, exact) + _one_turned_sign(case, exact)


def _one_turned_sign(case: Case, exact: dict[str, Tensor]) -> float:
    """LAMB moves a tensor of one element by lr |w| whatever the size of its update, so only the sign of that counts. In
    low precision rounding may turn one that is near 0, in the run and not in the oracle: two such steps, of ‖w‖.
    """
    if case.base != "Lamb" or case.precision == "fp32":
        return 0.0
    single = max((float(w.abs()) for w in exact.values() if w.numel() == 1), default=0.0)
    return 2 * case.base_params["lr"] * single / float(torch.cat([w.reshape(-1) for w in exact.values()]).norm())


def check(seed: int) -> tuple[Case, float, float, Oracle]:
    """Run one draw: its case, tolerance, error and oracle."""
    case, tolerance = draw(seed)
    reference, error, _ = compare_with_oracle(case)
    assert error <= tolerance, f"seed {seed}: relative error {error:.1e} > {tolerance:.1e} for {case}"
    return case, tolerance, error, reference


def seeds(draws: int, seed: int) -> Iterator[int]:
    """Of the draws of one run."""
    yield from (1_000_000 * seed + i for i in range(draws))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, help="run the draw of this seed only")
    options = parser.parse_args(arguments)
    todo = [options.replay] if options.replay is not None else list(seeds(options.draws, options.seed))
    failed, seen, clipped, start = [], Counter[str](), 0, time.monotonic()
    for seed in sorted(todo, key=lambda s: draw(s)[0].world):  # starting rank processes is the slow part
        try:
            case, tolerance, error, reference = check(seed)
        except Exception as problem:
            failed.append(seed)
            print(f"FAILED {seed}: {draw(seed)[0]}\n{type(problem).__name__}: {problem}", flush=True)
            continue
        clipped += reference.clipped > 0
        seen.update([f"stage {case.stage}", case.precision, f"world {case.world}", case.base, *case.zero,
                     *(["zero_init"] if case.zero_init else [])])
        print(f"ok {seed}: error {error:.1e}, tolerance {tolerance:.1e}, {_differences(case)}", flush=True)
    print(f"{len(todo)} draws in {time.monotonic() - start:.0f} s, {len(failed)} failed {failed}; clipping bound in "
          f"{clipped}; " + ", ".join(f"{what}: {n}" for what, n in sorted(seen.items())))
    return 1 if failed else 0


def _differences(case: Case) -> str:
    default = Case()
    return ", ".join(f"{name}={getattr(case, name)}" for name in vars(case)
                     if getattr(case, name) != getattr(default, name))


if __name__ == "__main__":
    sys.exit(main())
