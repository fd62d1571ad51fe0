"""The page that ``verify`` goes by, ds_looksam/reference.py, against the oracle, in float64 and in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ds_looksam.reference import Reference

from .covering import covering
from .models import make_model
from .training import Case, distance, named, start_oracle

TOLERANCE = 1e-12
"""float64 rounds at 1e-16. Twelve updates of some ten operations each, and Adam's division by elements a hundred times
smaller than the others, leave up to 1e-14 over these cases; nineteen mistakes that were tried left 1e-7 and more."""

BASES = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad}
LINEAR = {"type": "linear", "start": 0.2, "end": 1.5, "updates": 5}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {}, "linear": {**LINEAR, "off_updates": 2}, "cosine": {**LINEAR, "type": "cosine"},
    "off": {"off_updates": 3},
}
GRID = {
    "model": ["mlp", "dead_and_frozen", "tied", "straddling", "tiny", "random-3", "random-8"],
    "k": [1, 2, 3, 5], "rho": [0.0, 0.02, 0.1, 0.5], "alpha": ["auto", 0.0, 0.7], "base": list(BASES),
    "clipping": [0.0, 0.02, 0.3], "layer_scale": [None, "norm", "relative", "gradient"],
    "two_groups": [False, True], "schedule": list(SCHEDULES), "groups": [(6, ), (3, 3), (1, 2, 3), 6 * (1, )],
    "v_dtype": [None, torch.bfloat16],
}


@dataclass(frozen=True)
class OwnAlpha(Case):
    """The second param group has an alpha of its own too."""

    @property
    def second_group(self) -> dict[str, Any]:
        return {**super().second_group, "alpha": 0.3 if self.alpha == "auto" else "auto"}


def check(case: Case, groups: tuple[int, ...] = (6, ), v_dtype: torch.dtype | None = None,
          before: Callable[[int, Any, Reference], None] = lambda update, exact, reference: None) -> None:
    """``groups``: how many micro-batches share a perturbation. ``before``: what is done to the oracle and the reference
    before each update."""
    exact, module, oracle_groups = start_oracle(case, v_dtype=v_dtype or torch.float64)
    exact.groups_of = lambda window: [window[sum(groups[:i]):sum(groups[:i + 1])] for i in range(len(groups))]
    trained = make_model(case.model, case.seed).double()
    keys = {key: value for key, value in case.base_params.items() if key != "adam_w_mode"}
    schedule = {**case.params.get("rho_schedule", {})}
    reference = Reference(BASES[case.base](case.model_parameters(trained), **keys), k=case.k, rho=case.rho,
                          alpha=case.alpha, layerwise=case.layer_scale is not None,
                          layer_scale=case.layer_scale or "norm", rho_schedule=schedule, clipping=case.clipping,
                          v_dtype=v_dtype)
    for update in range(case.updates):
        before(update, exact, reference)
        exact.update(case.window(update))
        losses = [lambda x=x, y=y: trained(x, y) for x, y in case.window(update)]
        reference.update([[losses.pop(0) for _ in range(size)] for size in groups])
    expected, got = named(exact.w, module, oracle_groups), dict(trained.named_parameters())
    error = distance({name: got[name].detach() for name in expected}, expected)
    assert error <= TOLERANCE, f"relative error {error:.1e} for {case}, groups {groups}"
    assert reference.evaluations == exact.evaluations
    assert exact.beta is None or reference.beta == pytest.approx(exact.beta, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("settings", covering(GRID, strength=2), ids=lambda s: "-".join(map(str, s.values())))
def test_against_oracle(settings: dict[str, Any]) -> None:
    settings = dict(settings)
    groups, v_dtype = settings.pop("groups"), settings.pop("v_dtype")
    params = {"rho_schedule": SCHEDULES[settings.pop("schedule")]}
    check(OwnAlpha(**settings, world=2, accumulation=3, params=params), groups, v_dtype)


def lr_moves(update: int, exact: Any, reference: Reference) -> None:
    """rho follows the learning rate: a schedule that the oracle does not know, so its rho is set by hand."""
    reference.schedule = {"type": "lr", "lr": 0.02}
    for group, ours, factor in zip(exact.base.groups, reference.base.param_groups, (0.9, 0.8), strict=True):
        if update > 0:
            ours["lr"] = group.lr = group.lr * factor
        group.rho = ours["rho"] * group.lr / 0.02


def beta_is_negative(update: int, exact: Any, reference: Reference) -> None:
    """It adds nothing."""
    if update == 1:
        exact.beta = reference.beta = -0.4


def a_layer_is_zero(update: int, exact: Any, reference: Reference) -> None:
    """Its trust ratio is 1."""
    if update == 0:
        at, weight = sum(p.numel() for p in reference.parameters[:3]), reference.parameters[3]
        assert weight.dim() == 2
        exact.w[at:at + weight.numel()] = 0.0
        weight.data.zero_()


@pytest.mark.parametrize("before, case", [
    (lr_moves, Case(two_groups=True, alpha=0.7, world=2, accumulation=3)),
    (beta_is_negative, Case(world=2, accumulation=3, k=12)),
    (a_layer_is_zero, Case(world=2, accumulation=3, k=1, layer_scale="norm")),
])
def test_what_a_run_comes_to(before: Callable[[int, Any, Reference], None], case: Case) -> None:
    check(case, before=before)
