"""Random architectures, worlds and settings (hypothesis) against the float64 oracle; and what the zoo promises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .inside import shards as shards_of
from .ranks import run_on_ranks
from .test_oracle_grid import TOLERANCE
from .training import Case, check_against_oracle, engine_for

cases = st.builds(
    Case,
    model=st.integers(0, 10_000).map(lambda n: f"random-{n}"),
    seed=st.integers(0, 10_000),
    world=st.sampled_from([1, 2, 3, 4]),
    stage=st.sampled_from([0, 1, 2, 3]),
    accumulation=st.sampled_from([1, 2]),
    clipping=st.sampled_from([0.0, 0.05]),
    k=st.integers(1, 4),
    rho=st.sampled_from([0.0, 0.05, 0.5]),
    alpha=st.sampled_from([0.0, 0.7, 2.0, "auto"]),
    base=st.sampled_from(["AdamW", "SGD"]),
    two_groups=st.booleans(),
    updates=st.just(6),
)


# Without shrinking: a case is a few lines as it is, and each attempt trains on real ranks.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))
@given(case=cases)
def test_random_models(case: Case) -> None:
    check_against_oracle(case, TOLERANCE)


def ownership(case: Case) -> dict[str, list[tuple[int, int]]]:
    """This rank's pieces of every parameter: name -> [lo, hi) ranges of its elements."""
    with engine_for(case) as engine:
        names = {id(p): name for name, p in engine.module.named_parameters()}
        pieces: dict[str, list[tuple[int, int]]] = {}
        for segments in shards_of(engine).layout():
            for s in segments:
                assert s.numel > 0
                pieces.setdefault(names[id(s.parameter)], []).append((s.param_offset, s.param_offset + s.numel))
        return pieces


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("model", ["straddling", "tiny"])
def test_every_element_lives_on_exactly_one_rank(stage: int, model: str, world: int) -> None:
    case = Case(model=model, stage=stage, world=world)
    ranks = run_on_ranks(world, ownership, case)
    sizes = _sizes(case)
    for name, numel in sizes.items():
        covered = sorted(piece for pieces in ranks for piece in pieces.get(name, []))
        assert [lo for lo, _ in covered] == [0, *(hi for _, hi in covered[:-1])] and covered[-1][1] == numel, name
    assert {name for pieces in ranks for name in pieces} == set(sizes)
    # The zoo is what it says it is.
    if model == "straddling":
        assert sum("big.weight" in pieces for pieces in ranks) > 1
    if model == "tiny" and world == 4:
        assert any(not pieces for pieces in ranks)


def _sizes(case: Case) -> dict[str, Any]:
    from .models import make_model

    return {name: p.numel() for name, p in make_model(case.model).named_parameters() if p.requires_grad}
