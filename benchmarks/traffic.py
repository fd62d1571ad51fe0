"""Every collective of a training step, from torch.distributed itself, beside the formula. Prints Markdown.

    python -m benchmarks.traffic                 # the table of docs/costs.md: two ranks, bf16
    python -m benchmarks.traffic --world 4 --precision fp32
    python -m benchmarks.traffic --every         # and every single collective
    python -m benchmarks.traffic --ascent rank micro_batch global_micro_batch --accumulation 2    # a table for each

Real ranks on this machine's CPU train a small model; a dispatch mode below every wrapper of torch.distributed writes
down what each step hands to c10d. A payload is the largest argument of a collective on one rank (of an all-gather the
result, of a reduce-scatter the input), in units of P, the bytes of all weights in the model's dtype. What a payload
costs on the wire depends on the algorithm: in a ring of n ranks, each sends (n - 1)/n of it, of an all-reduce twice.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ds_looksam.config.params import ASCENTS
from tests.collectives import Collective
from tests.costs import Step, Wide, nothing_stays_gathered, record_steps
from tests.ranks import run_on_ranks
from tests.training import Case

STAGES = (0, 1, 2, 3)
EVERYWHERE = ("global", "global_micro_batch")
"""What stage 3 can do too."""
BYTES = {"fp32": 4, "bf16": 2}
SCALARS = 256
"""Bytes: what counts as an all-reduce of scalars. LookSAM sends a handful of float64; so does DeepSpeed for norms."""

KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "allgather_base": "all-gather",
         "reduce_scatter": "reduce-scatter", "reduce_scatter_base": "reduce-scatter"}

Payloads = dict[str, float]
"""Kind of collective -> payload in units of P."""

# The formulas, for a micro-batch; stages 0 and 1 reduce in a window's last one only. Stage 3 gathers the weights for
# the forward and, where they were released since, for the backward; here (nothing is kept between:
# "stage3_max_reuse_distance" 0) it always does.
EVALUATION: dict[int, Payloads] = {
    0: {"all-reduce": 1}, 1: {"all-reduce": 1}, 2: {"all-reduce": 1}, 3: {"all-gather": 2, "reduce-scatter": 1}}
UPDATE: dict[int, Payloads] = {0: {}, 1: {"all-gather": 1}, 2: {"all-gather": 1}, 3: {}}
PUBLICATION = UPDATE
"""w + eps is made known as the update makes w known: on stages 1 and 2 by one all-gather, on stage 3 by the forward."""


def evaluations(stage: int, micro_batches: int) -> Payloads:
    """Of a window, as DeepSpeed reduces it."""
    return times(1 if stage < 2 else micro_batches, EVALUATION[stage])


def sam_adds(stage: int, micro_batches: int, ascent: str) -> Payloads:
    """Beside a base step. Where each micro-batch has perturbations of its own, both its gradients are reduced, and w
    follows w + eps, which "micro_batch" need not publish."""
    again = evaluations(stage, micro_batches)
    if ascent == "global":
        return add(again, PUBLICATION[stage])
    if ascent == "rank":
        return again
    each = times(2 * micro_batches, EVALUATION[stage])
    adds = {kind: each[kind] - again[kind] for kind in each}  # of all, less the window's that the base step has too
    return adds if ascent == "micro_batch" else add(adds, times(2 * micro_batches, PUBLICATION[stage]))


def times(factor: int, payloads: Payloads) -> Payloads:
    return {kind: factor * payload for kind, payload in payloads.items()}


@dataclass(frozen=True)
class Traffic:
    """Of one stage: collectives of a window of so many micro-batches in each kind of step."""

    stage: int
    micro_batches: int
    ascent: str
    base: list[Collective]
    reuse: list[Collective]
    sam: list[Collective]
    weights: int

    def payloads(self, collectives: Iterable[Collective]) -> Payloads:
        sums: Counter[str] = Counter()
        for c in collectives:
            if not is_scalar(c):
                sums[KINDS.get(c.kind, c.kind)] += c.nbytes
        return {kind: nbytes / self.weights for kind, nbytes in sorted(sums.items())}

    def beside_base(self, collectives: list[Collective]) -> tuple[Payloads, list[Collective]]:
        """What is sent beside a base step: payloads, and the all-reduces of scalars."""
        extra = Counter(collectives)
        extra.subtract(self.base)
        if min(extra.values(), default=0) < 0:
            raise AssertionError(f"stage {self.stage}: a collective of the base step is missing")
        return self.payloads(extra.elements()), [c for c in extra.elements() if is_scalar(c)]

    def expected_base(self) -> Payloads:
        return add(evaluations(self.stage, self.micro_batches), UPDATE[self.stage])

    def expected_sam(self) -> Payloads:
        return sam_adds(self.stage, self.micro_batches, self.ascent)


def is_scalar(c: Collective) -> bool:
    return c.kind == "allreduce" and c.nbytes <= SCALARS


def add(*parts: Payloads) -> Payloads:
    total: Any = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))


def measure(stage: int, world: int, precision: str, ascent: str = "global", micro_batches: int = 1) -> Traffic:
    zero = nothing_stays_gathered(stage) | ({"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
                                            if stage == 3 else {})
    case = Case(stage=stage, world=world, precision=precision, k=3, alpha=0.7, updates=5, zero=zero,
                ascent=ascent, accumulation=micro_batches)
    plain: list[Step] = run_on_ranks(world, record_steps, case, False)[0]
    ours: list[Step] = run_on_ranks(world, record_steps, case, True)[0]
    # Stage 3 records its trace in the first windows; 3 is the second SAM step, 4 the reuse step after it.
    base, sam, reuse = (s.evaluation + s.update for s in (plain[4], ours[3], ours[4]))
    weights = sum(p.numel() for p in Wide().parameters()) * BYTES[precision]
    return Traffic(stage, micro_batches, ascent, base, reuse, sam, weights)


def shown(payloads: Payloads) -> str:
    return " + ".join(f"{value:.2f} P {kind}" for kind, value in payloads.items()) or "nothing"


def table(rows: list[Traffic]) -> str:
    """One line per stage, measured. Raises AssertionError where the formula says something else."""
    lines = ["| ZeRO stage | base step | a reuse step adds | a SAM step adds | "
             "extra all-reduces of scalars, SAM / reuse step |",
             "|---|---|---|---|---|"]
    for row in rows:
        sam, sam_scalars = row.beside_base(row.sam)
        reuse, reuse_scalars = row.beside_base(row.reuse)
        for got, expected in ((row.payloads(row.base), row.expected_base()), (reuse, {}), (sam, row.expected_sam())):
            # ZeRO pads partitions to equal sizes: under 1 % of a model this size.
            if got.keys() != expected.keys() or any(abs(got[k] - expected[k]) > 0.01 * expected[k] for k in got):
                raise AssertionError(f"stage {row.stage}: measured {shown(got)}, the formula says {shown(expected)}")
        scalars = f"{len(sam_scalars)} / {len(reuse_scalars)}"
        lines.append(f"| {row.stage} | {shown(row.payloads(row.base))} | {shown(reuse)} | {shown(sam)} | {scalars} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--precision", choices=sorted(BYTES), default="bf16")
    parser.add_argument("--ascent", nargs="+", choices=ASCENTS, default=["global"])
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--every", action="store_true", help="list every collective too")
    args = parser.parse_args()
    for ascent in args.ascent:
        rows = [measure(stage, args.world, args.precision, ascent, args.accumulation)
                for stage in STAGES if stage < 3 or ascent in EVERYWHERE]
        if args.every:
            for row in rows:
                for name in ("base", "reuse", "sam"):
                    print(f"\nstage {row.stage}, {name} step:\n")
                    for c, n in Counter(getattr(row, name)).items():
                        print(f"- {n} x {c.kind}, {c.nbytes} bytes, {c.ranks} ranks")
            print()
        if args.ascent != ["global"]:
            print(f"\n\"ascent\": \"{ascent}\":\n")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
