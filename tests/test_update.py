"""Algorithm 1 without DeepSpeed: ``step/update.py`` in this process, on a plain torch optimizer, against the oracle.

What decides an update (k, alpha, rho and its schedule, layers, groups, base, clipping, how g_v is kept, into how many
flat tensors a group is cut) is combined here, where a run takes some hundredths of a second. That each of DeepSpeed's
wrappers hands over the right gradient and weights is for real ranks to show: test_oracle_grid.py and the others.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_looksam
from ds_looksam.config.params import parse_params, set_group_defaults
from ds_looksam.config.rounding import DTYPES
from ds_looksam.shards.replicated import ReplicatedShards
from ds_looksam.step.schedule import RhoFactors
from ds_looksam.step.state import LookSAMState
from ds_looksam.step.status import LookSAMStatus
from ds_looksam.step.update import Update

from .covering import covering
from .models import make_model
from .training import Case, allowed, distance, named, run_oracle, start_oracle

CPU = torch.device("cpu")

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-4}
"""By how g_v is kept. fp32 as in test_oracle_grid; bf16 as in test_options, against an oracle that rounds it too."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad,
    "Lamb": ds_looksam.Lamb, "Lars": ds_looksam.Lars,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}), "AdamW-betas": ("AdamW", {"betas": (0.8, 0.95), "eps": 1e-6}), "Adam": ("Adam", {}),
    "SGD": ("SGD", {}), "SGD-nesterov": ("SGD", {"nesterov": True}), "Adagrad": ("Adagrad", {}),
    "Lamb": ("Lamb", {"betas": (0.8, 0.95)}), "Lamb-uncorrected": ("Lamb", {"bias_correction": False}),
    "Lamb-clamped": ("Lamb", {"min_coeff": 0.5, "max_coeff": 1.5}),
    "Lars": ("Lars", {}), "Lars-plain": ("Lars", {"momentum": 0.0, "weight_decay": 0.0}),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"type": "linear", "start": 0.2, "end": 1.0, "updates": 6},
    "cosine": {"type": "cosine", "start": 1.0, "end": 0.1, "updates": 5, "off_updates": 3},
    "off": {"off_updates": 5},
}


class CutShards(ReplicatedShards):
    """As a wrapper with several flat tensors per param group (sub-groups), whose clipping norm it has to be told."""

    wants_squared_norm = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, CPU)
        pieces = [(i, params[lo:lo + 2]) for i, params in enumerate(self.groups) for lo in range(0, len(params), 2)]
        self.group_of, self.groups = [i for i, _ in pieces], [piece for _, piece in pieces]
        self.told: Tensor | None = None
        self.given = False

    def give_gradient(self, gradient: list[Tensor]) -> None:
        super().give_gradient(gradient)
        self.given = True

    def follow_changes(self, within_window: bool) -> Any:
        return None  # as DeepSpeed's wrappers, it keeps the pieces it began with

    def tell_squared_norm(self, squared_norm: Tensor) -> None:
        self.told = squared_norm


class Run:
    """A training run whose second evaluation is a call of the first.

    ``spoilt``: (window, evaluation) -> what that evaluation's loss is multiplied by; of an update that is skipped, with
    nan or inf, the samples come again. ``scale_of``: window -> its loss scale, taken off again before clipping, as
    DeepSpeed does.
    """

    is_perturbed = False
    edit_gradients = forget = check = update_is_over = staticmethod(lambda in_step=True: None)
    """Of the engine's and the replay's parts, what a run in one process has no use for."""

    def __init__(self, case: Case, cut: bool = False, spoilt: dict[tuple[int, int], float] | None = None,
                 scale_of: Callable[[int], float] = lambda window: 1.0) -> None:
        self.case, self.spoilt, self.scale_of = case, spoilt or {}, scale_of
        block = case.json()["optimizer"]
        settings, base = parse_params(block["params"], block["type"])
        base.pop("adam_w_mode", None)
        self.module = make_model(case.model, case.seed)
        self.optimizer = OPTIMIZERS[case.base](case.model_parameters(self.module), **base)
        for group in self.optimizer.param_groups:
            set_group_defaults(group, settings)
        self.shards = CutShards(self.optimizer) if cut else ReplicatedShards(self.optimizer, CPU)
        self.shards.whole_groups = [list(group["params"]) for group in self.optimizer.param_groups]
        factors = RhoFactors(settings.rho_schedule, [group["lr"] for group in self.optimizer.param_groups])
        self.status = LookSAMStatus(k=settings.k, first_sam_update=settings.rho_schedule.off_updates)
        self.state = LookSAMState(self.status, self.shards, DTYPES[settings.v_dtype])
        self.update = Update(settings, self.state, self.shards, self, factors,
                             param_groups=lambda: self.optimizer.param_groups,
                             loss_scale=lambda: self.scale_of(self.window), is_observed=lambda: False)
        self.window, self.evaluations, self.losses = 0, 0, []

    def train(self, windows: int) -> dict[str, Tensor]:
        for _ in range(windows):
            for p in self.module.parameters():
                p.grad = torch.zeros_like(p)  # as a DeepSpeed engine leaves a parameter that took no part in the loss
            self.evaluations, self.losses = 0, []
            self.evaluate()
            self.update(self.apply)
            self.window += 1
        return {name: p.detach().clone() for name, p in self.module.named_parameters() if p.requires_grad}

    def apply(self) -> bool:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        if isinstance(self.shards, CutShards):
            assert self.shards.given == (self.shards.told is not None)
            self.shards.given = False
        told = getattr(self.shards, "told", None)
        if told is not None:
            given = float(sum(p.grad.double().square().sum() for p in parameters))
            # It is formed from sums of dot products in fp32.
            assert told.item() == pytest.approx(given, rel=1e-5, nan_ok=True) or not math.isfinite(given)
            self.shards.told = None
        if not all(torch.isfinite(p.grad).all() for p in parameters):
            return False
        for p in parameters:
            p.grad /= self.scale_of(self.window)
        if self.case.clipping:
            torch.nn.utils.clip_grad_norm_(parameters, self.case.clipping)
        self.optimizer.step()
        return True

    def perturbed(self, shards: Any, put_back: Callable[[], None]) -> Any:
        return nullcontext()

    def evaluate(self) -> None:
        self.evaluations += 1
        factor = self.spoilt.get((self.window, self.evaluations), 1.0) * self.scale_of(self.window)
        window = self.case.window(self.status.updates)  # one that was skipped has no samples of its own
        losses = [self.module(x.float(), y) for x, y in window]
        for loss in losses:
            (loss * factor / len(window)).backward()
        self.losses.append(sum(loss.item() for loss in losses) / len(window))

    def loss_rise(self, device: torch.device) -> Tensor:
        return torch.tensor([self.losses[1] - self.losses[0]], dtype=torch.float64)


def check(case: Case, run: Run) -> None:
    kept = case.params.get("v_dtype", "fp32")
    v_dtype = torch.bfloat16 if kept == "bf16" else torch.float64
    reference, expected = run_oracle(case, v_dtype=v_dtype)
    error = distance(run.train(case.updates + len(run.spoilt)), expected)
    tolerance = allowed(case, TOLERANCE[kept], error, reference)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e} for {case}"
    assert run.status.updates == case.updates
    assert run.status.evaluations == reference.evaluations + sum(evaluation for _, evaluation in run.spoilt)
    if case.clipping:
        assert reference.clipped > 0, "clipping was meant to bind"


GRID: dict[str, list[Any]] = {
    "k": [1, 2, 3, 5],
    "alpha": [0.0, 0.7, "auto"],
    "rho": [0.02, 0.1],
    "schedule": list(SCHEDULES),
    "layer_scale": [None, "norm", "relative", "gradient"],
    "two_groups": [False, True],
    "base": list(BASES),
    "clipping": [0.0, 0.03],
    "accumulation": [1, 3],
    "v_dtype": ["fp32", "bf16"],
    "cut": [False, True],
    "model": ["mlp", "dead_and_frozen", "tied", "straddling", "tiny", "sometimes", "random-3", "random-11"],
}


def _run(settings: dict[str, Any]) -> tuple[Case, Run]:
    settings = dict(settings)
    cut, schedule = settings.pop("cut"), SCHEDULES[settings.pop("schedule")]
    settings["base"], options = BASES[settings["base"]]
    params = {"v_dtype": settings.pop("v_dtype"), **({"rho_schedule": schedule} if schedule else {})}
    case = Case(world=1, params=params, options=options, **settings)
    return case, Run(case, cut)


@pytest.mark.parametrize("row", covering(GRID, strength=3, pairs=("model", )),
                         ids=lambda row: "-".join(map(str, row.values())))
def test_matches_oracle(row: dict[str, Any]) -> None:
    """Every triple of settings, each with every model."""
    check(*_run(row))


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(10))
def test_matches_oracle_anywhere(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        check(*_run({key: draw.choice(values) for key, values in GRID.items()}))


@pytest.mark.parametrize("mistake", [{"rho": 0.105}, {"alpha": 0.67}, {"k": 4}, {"layer_scale": "norm"}], ids=str)
def test_tolerance_tells_mistakes(mistake: dict[str, Any]) -> None:
    case = Case(world=1, alpha=0.7)
    with pytest.raises(AssertionError, match="relative error"):
        check(case, Run(replace(case, **mistake)))


PLACES = {"first SAM step": [(0, 1), (4, 1)], "second evaluation": [(0, 2), (4, 2)], "reuse": [(1, 1), (3, 1)]}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("layer_scale", [None, "norm"])
@pytest.mark.parametrize("alpha", [0.7, "auto"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("place", list(PLACES))
def test_skipped_windows_leave_nothing_behind(place: str, value: float, alpha: float | str, layer_scale: str | None,
                                              cut: bool) -> None:
    """The run is that of the oracle, which never had them. Window 4 is a SAM step too where window 0 was skipped."""
    check(Case(world=1, alpha=alpha, layer_scale=layer_scale, updates=8),
          Run(Case(world=1, alpha=alpha, layer_scale=layer_scale), cut, dict.fromkeys(PLACES[place], value)))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("layer_scale", [None, "norm", "relative", "gradient"])
@pytest.mark.parametrize("alpha", [0.7, "auto"])
def test_loss_scale_may_change_between_updates(alpha: float | str, layer_scale: str | None, cut: bool) -> None:
    """g_v is kept with the scale of its own window, and is worth the same in another."""
    case = Case(world=1, alpha=alpha, layer_scale=layer_scale, two_groups=True, clipping=0.05)
    plain, scaled = Run(case, cut), Run(case, cut, scale_of=lambda window: 2.0**((window * 5) % 8))
    check(case, scaled)
    plain.train(case.updates)
    for name, value in plain.status.measurements().items():
        # Beta is one of them. sharpness: of losses, which carry no scale here.
        assert scaled.status.measurements()[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
@pytest.mark.parametrize("v_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("schedule", ["none", "cosine"])
def test_state_is_all_that_a_run_needs_to_go_on(schedule: str, v_dtype: str, stop: int) -> None:
    """Bit for bit, with what a checkpoint holds: v in fp32, everything else as JSON."""
    params = {"v_dtype": v_dtype, "rho_schedule": SCHEDULES[schedule]}
    case = Case(world=1, two_groups=True, layer_scale="norm", params=params)
    whole, first, rest = Run(case), Run(case), Run(case)
    expected = whole.train(case.updates)
    first.train(stop)
    rest.module.load_state_dict(first.module.state_dict())
    rest.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    v = first.state.v and [part.float() for part in first.state.v]
    rest.state.restore(json.loads(json.dumps(first.state.to_json())), v)
    got = rest.train(case.updates - stop)
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    assert rest.status.as_dict() == whole.status.as_dict()


def test_what_is_restored_replaces_what_was_there() -> None:
    """Nothing to go on with: the next update is a SAM step, and beta starts anew."""
    case = Case(world=1)
    run = Run(case)
    run.train(5)
    run.state.restore({}, None)
    assert run.state.v is None and run.state.v_squared is None
    assert run.status == LookSAMStatus(k=case.k)


def test_settings_of_the_param_groups_are_read_at_every_update() -> None:
    """rho, alpha and lr as they stand there, and the schedule "lr" by the lr that is in force."""
    case = Case(world=1, two_groups=True, updates=9, params={"rho_schedule": {"type": "lr"}})
    run = Run(case)
    reference, module, groups = start_oracle(replace(case, params={}))
    configured = [group.lr for group in groups]
    for update in range(case.updates):
        for i, (ours, theirs) in enumerate(zip(run.optimizer.param_groups, groups, strict=True)):
            ours["lr"] = theirs.lr = configured[i] * (1 + update % 4) / 3
            ours["rho"] = 0.1 + 0.02 * update * (1 - i)
            theirs.rho = ours["rho"] * theirs.lr / configured[i]
            ours["alpha"] = theirs.alpha = [0.3 * (update % 3), "auto"][(update + i) % 2]
        weights = run.train(1)
        reference.update(case.window(update))
        assert run.status.rho == pytest.approx([group.rho for group in groups])
        assert run.status.alpha == [None if group.alpha == "auto" else group.alpha for group in groups]
    assert distance(weights, named(reference.w, module, groups)) <= TOLERANCE["fp32"]


@pytest.mark.parametrize("layer_scale", [None, "norm", "relative", "gradient"])
def test_a_gradient_of_zero_moves_nothing(layer_scale: str | None) -> None:
    """In a SAM step (window 3) and a reuse step (window 4): nothing is divided by its norm."""
    case = Case(world=1, layer_scale=layer_scale, base="SGD", options={"momentum": 0.0, "weight_decay": 0.0})
    run = Run(case, spoilt={(3, 1): 0.0, (3, 2): 0.0, (4, 1): 0.0})
    before = run.train(3)
    after = run.train(2)
    assert run.status.beta is not None and all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(torch.isfinite(weight).all() for weight in run.train(2).values())
    assert all(math.isfinite(value) for value in run.status.measurements().values())
