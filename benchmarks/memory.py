"""Bytes a rank holds beside the base optimizer's, by stage, precision, offload and the dtype of g_v. Prints Markdown.

    python -m benchmarks.memory                # two ranks
    python -m benchmarks.memory --world 4

*Persistent*: all tensor storages that Python reaches after an update, less those of the same run without LookSAM.
*Replay*: the same while the last layer's forward of a SAM step's second evaluation runs: everything that must outlive
that evaluation, so what a SAM step needs on top of an evaluation's own peak.

S stands for an fp32 shard: 4 bytes for every parameter that this rank owns (all of them on stage 0). The formulas:

- persistent: g_v, S, or S/2 with ``"v_dtype": "bf16"``;
- replay: g_v, and the first gradient g (S), which cannot be the wrapper's own buffer because the second evaluation
  writes there; on stage 0 also a copy of the clean weights in the model's dtype. With ZeRO they are there anyway: the
  fp32 master lies apart from what the model computes with, in fp32 training too.
- replay with "ascent" "rank" and "micro_batch": the rank's own gradient too, of the whole model, in its dtype (in fp32
  on stage 0); with "micro_batch" a copy of the clean weights on every stage. Where a window has several micro-batches,
  the sums of g and g_s so far are 2 S more in the micro-batch modes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tests.costs import Memory, Wide, measure_memory, nothing_stays_gathered
from tests.ranks import run_on_ranks
from tests.training import Case

BYTES = {"fp32": 4, "bf16": 2}
WIDTH = 20_000  # of the model: 2.1 million parameters, so that padding and what belongs to no shard are under 1 %
TOLERANCE = 0.05

Model = partial(Wide, WIDTH)


@dataclass(frozen=True)
class Row:
    """One configuration: extra bytes of a rank, measured and by the formula."""

    stage: int
    precision: str
    offload: bool
    v_dtype: str
    persistent: int
    replay: int
    shard: int
    ascent: str
    whole: int

    @property
    def expected_persistent(self) -> float:
        return self.shard * BYTES[self.v_dtype] / 4

    @property
    def expected_replay(self) -> float:
        model = self.whole * BYTES[self.precision] / 4
        clean_weights = model if self.stage == 0 or self.ascent == "micro_batch" else 0
        own_gradient = (model if self.stage else self.whole) if self.ascent in ("rank", "micro_batch") else 0
        return self.expected_persistent + self.shard + clean_weights + own_gradient

    def check(self) -> None:
        """Raises AssertionError where measured and formula differ by more than 5 %."""
        for what, got, expected in (("persistent", self.persistent, self.expected_persistent),
                                    ("replay", self.replay, self.expected_replay)):
            if abs(got - expected) > TOLERANCE * expected:
                raise AssertionError(f"{what}: {got / self.shard:.2f} S measured, {expected / self.shard:.2f} S by the "
                                     f"formula: {self}")


def configurations() -> Iterator[tuple[int, str, bool, str, str]]:
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            for offload in (False, True) if stage else (False, ):
                yield stage, precision, offload, "fp32", "global"
    yield 2, "bf16", False, "bf16", "global"
    yield 3, "bf16", True, "bf16", "global"
    for ascent in ("rank", "micro_batch"):
        for stage, precision in ((0, "bf16"), (2, "fp32"), (2, "bf16")):
            yield stage, precision, False, "fp32", ascent
    yield 3, "bf16", False, "fp32", "global_micro_batch"


def measure(stage: int, precision: str, offload: bool, v_dtype: str, ascent: str, world: int) -> Row:
    zero: dict[str, Any] = {**nothing_stays_gathered(stage)}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    case = Case(stage=stage, world=world, precision=precision, k=2, alpha=0.7, zero=zero, params={"v_dtype": v_dtype},
                ascent=ascent, options={"torch_adam": True} if not offload else {})
    ours: Memory = run_on_ranks(world, measure_memory, case, True, Model)[0]
    plain: Memory = run_on_ranks(world, measure_memory, replace(case, params={}), False, Model)[0]
    whole = 4 * sum(p.numel() for p in Model().parameters())
    return Row(stage, precision, offload, v_dtype, ours.after - plain.after, ours.during - plain.during,
               whole // (world if stage else 1), ascent, whole)


def line(row: Row) -> str:
    cells = [row.stage, row.precision, "cpu" if row.offload else "", row.v_dtype, row.ascent]
    for got, expected in ((row.persistent, row.expected_persistent), (row.replay, row.expected_replay)):
        cells += [f"{got / row.shard:.2f} S", f"{expected / row.shard:.2f} S"]
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = ("| stage | precision | offload | g_v | ascent | persistent | formula | replay | formula |\n"
        "|---|---|---|---|---|---|---|---|---|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2)
    args = parser.parse_args()
    print(HEAD)
    rows = []
    for configuration in configurations():
        rows.append(measure(*configuration, world=args.world))
        print(line(rows[-1]), flush=True)
    for row in rows:
        row.check()


if __name__ == "__main__":
    main()
