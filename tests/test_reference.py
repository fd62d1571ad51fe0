"""The page that ``verify`` goes by, ds_looksam/reference.py, against the oracle, in float64 and in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from ds_looksam.reference import Reference

from . import oracle
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
          change: Callable[[nn.Module], Any] = lambda module: None, beta: float | None = None) -> None:
    """``change``: what is done to the model before. ``beta``: what stands in its place after the first update."""
    modules = [make_model(case.model, case.seed).double() for _ in range(2)]
    for module in modules:
        change(module)
    oracle_groups = [group for group in case.oracle_groups(modules[0]) if group.names]
    exact = oracle.build(modules[0], oracle_groups, base=case.base, k=case.k, clipping=case.clipping,
                         layer_scale=case.layer_scale)
    schedule = case.params.get("rho_schedule", {})
    exact.rho_factor, exact.off = oracle.rho_factor(schedule), schedule.get("off_updates", 0)
    exact.v_dtype = v_dtype or torch.float64
    exact.groups_of = lambda window: [window[sum(groups[:i]):sum(groups[:i + 1])] for i in range(len(groups))]
    keys = {key: value for key, value in case.base_params.items() if key != "adam_w_mode"}
    base = BASES[case.base](case.model_parameters(modules[1]), **keys)
    reference = Reference(base, k=case.k, rho=case.rho, alpha=case.alpha, layerwise=case.layer_scale is not None,
                          layer_scale=case.layer_scale or "norm", rho_schedule=schedule, clipping=case.clipping,
                          v_dtype=v_dtype)
    for update in range(case.updates):
        exact.update(case.window(update))
        losses = [lambda x=x, y=y: modules[1](x, y) for x, y in case.window(update)]
        reference.update([[losses.pop(0) for _ in range(size)] for size in groups])
        if update == 0 and beta is not None:
            exact.beta = reference.beta = beta
    expected, got = named(exact.w, modules[0], oracle_groups), dict(modules[1].named_parameters())
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


def test_rho_follows_the_learning_rate() -> None:
    """A schedule that the oracle does not know, by an oracle whose rho is set by hand."""
    case = Case(two_groups=True, alpha=0.7)
    exact, module, groups = start_oracle(case)
    trained = make_model(case.model, case.seed).double()
    base = torch.optim.AdamW(case.model_parameters(trained), **case.base_params)
    reference = Reference(base, k=case.k, rho=case.rho, alpha=case.alpha, rho_schedule={"type": "lr", "lr": 0.02})
    lrs, rhos = [group["lr"] for group in base.param_groups], [group["rho"] for group in base.param_groups]
    for update in range(case.updates):
        for i, factor in enumerate((0.9**update, 0.8**update)):
            base.param_groups[i]["lr"] = exact.base.groups[i].lr = lrs[i] * factor
            exact.base.groups[i].rho = rhos[i] * lrs[i] * factor / 0.02
        exact.update(case.window(update))
        reference.update([[lambda x=x, y=y: trained(x, y) for x, y in case.window(update)]])
    got, expected = dict(trained.named_parameters()), named(exact.w, module, groups)
    assert distance({name: got[name].detach() for name in expected}, expected) <= TOLERANCE


def test_a_negative_beta_adds_nothing() -> None:
    check(Case(world=2, accumulation=3, k=12), beta=-0.4)


def test_layers_of_zeros_have_trust_ratio_1() -> None:
    case = Case(world=2, accumulation=3, k=1, layer_scale="norm")
    check(case, change=lambda module: module.second.weight.data.zero_())


@pytest.mark.parametrize("base", ["AdamW", "SGD"])
def test_rho_0_with_alpha_0_is_the_base_to_the_bit(base: str) -> None:
    case = Case(base=base)
    plain, module = (make_model(case.model, case.seed).double() for _ in range(2))
    optimizer = BASES[base](plain.parameters(), **case.base_params)
    reference = Reference(BASES[base](module.parameters(), **case.base_params), k=2, rho=0.0, alpha=0.0)
    for update in range(case.updates):
        (x, y), *_ = case.window(update)
        optimizer.zero_grad()
        plain(x, y).backward()
        optimizer.step()
        reference.update([[lambda x=x, y=y: module(x, y)]])
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
