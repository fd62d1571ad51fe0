"""Ascent groups (the JSON key ``ascent``): a perturbation per rank, per micro-batch, or per accumulation step of all.

CI runs a subset in which every pair of settings occurs, ``pytest -m grid`` any. Ways to accumulate are in
test_accumulation.py, faults of the second evaluation and interruptions also in test_checkpoint_broken.py,
test_overflow.py and test_faults.py, resuming is in test_checkpoint.py.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_looksam.engines.passes import COMPILES_ON_CPU

from .costs import Step, record_steps
from .covering import covering
from .fuzz import rounding_tolerance
from .inside import is_evaluating_again
from .models import Mlp
from .ranks import run_on_ranks
from .test_replay import outside_loss, train_outside, without_loss
from .training import (
    TOLERANCE,
    Case,
    batches_for,
    check_against_oracle,
    compare_with_oracle,
    distance,
    engine_for,
    master_weights,
    run_oracle,
    train,
    visible_weights,
)

MODES = ["global", "rank", "micro_batch", "global_micro_batch"]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

GRID = {
    "stage": [0, 1, 2, 3],
    "ascent": MODES[1:],
    "world": [1, 2, 4],
    "accumulation": [1, 3],
    "clipping": [0.0, 0.05],
    "alpha": [0.7, "auto"],
    "k": [1, 3],
    "base": ["AdamW", "SGD", "Lamb"],
    "layer_scale": [None, "norm", "relative", "gradient"],
    "model": ["mlp", "dead_and_frozen", "tied", "straddling", "tiny", "sometimes", "random-3"],
    "two_groups": [False, True],
    "schedule": ["constant", "linear", "off"],
}
SCHEDULES = {"constant": {}, "linear": {"type": "linear", "start": 1.0, "end": 0.2, "updates": 5},
             "off": {"off_updates": 2}}


def _cases(rows: list[dict[str, Any]]) -> list[Case]:
    """Stage 3's weights are shared: it has "global_micro_batch" alone."""
    return [Case(**{key: value for key, value in row.items() if key != "schedule"}, updates=7,
                 rho=0.01 if row["layer_scale"] == "relative" else 0.1,
                 params={"rho_schedule": SCHEDULES[row["schedule"]]})
            for row in rows if row["stage"] < 3 or row["ascent"] == "global_micro_batch"]


def _id(case: Case) -> str:
    return "-".join([*(str(getattr(case, key)) for key in GRID if key != "schedule"), *case.zero, *case.config,
                     *case.params.get("rho_schedule", case.params)])


@pytest.mark.parametrize("case", _cases(covering(GRID, strength=2)), ids=_id)
def test_matches_oracle(case: Case) -> None:
    check_against_oracle(case, TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(20))
def test_matches_oracle_anywhere(seed: int) -> None:
    draw = random.Random(seed)
    for case in _cases([{key: draw.choice(values) for key, values in GRID.items()} for _ in range(40)]):
        check_against_oracle(case, TOLERANCE)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("rank", {"zero": OFFLOAD, "stage": 1}), ("micro_batch", {"zero": OFFLOAD, "stage": 2}),
    ("rank", {"zero": {"round_robin_gradients": True}}), ("micro_batch", {"zero": {"round_robin_gradients": True}}),
    ("rank", {"zero": {"overlap_comm": True, "reduce_bucket_size": 50}}),
    ("micro_batch", {"zero": {"overlap_comm": True, "reduce_bucket_size": 50}}),
    *([("rank", {"params": {"compile": True}, "model": "mlp"})]
      if Version(torch.__version__) >= COMPILES_ON_CPU else []),
    ("micro_batch", {"base": "Lars", "layer_scale": "norm"}),
    ("global_micro_batch", {"zero": {"stage3_param_persistence_threshold": 0}, "stage": 3}),
    ("global_micro_batch", {"zero": {"zero_hpz_partition_size": 2}, "stage": 3, "zero_init": True}),
    ("global_micro_batch", {"zero": {**OFFLOAD, "offload_param": {"device": "cpu"}}, "stage": 3, "zero_init": True}),
]


@pytest.mark.parametrize("case", [
    Case(**{"model": "straddling", "accumulation": 2, "clipping": 0.05, "updates": 7, "ascent": ascent, **settings})
    for ascent, settings in SETTINGS], ids=_id)
def test_options(case: Case) -> None:
    check_against_oracle(case, 3 * TOLERANCE)  # DeepSpeedCPUAdam: see test_options


@pytest.mark.parametrize(("stage", "layer_scale"), [(0, "gradient"), (1, "norm"), (2, None), (3, "relative")])
def test_one_micro_batch_on_one_rank_is_one_group_in_every_mode(stage: int, layer_scale: str | None) -> None:
    """To the bit."""
    case = Case(world=1, stage=stage, layer_scale=layer_scale, two_groups=True, model="tied", updates=7,
                rho=0.01 if layer_scale == "relative" else 0.1)
    (expected, ) = run_on_ranks(1, train, case)
    for mode in MODES[1:] if stage < 3 else MODES[3:]:
        (got, ) = run_on_ranks(1, train, replace(case, ascent=mode))
        for name, weight in expected.weights.items():
            assert torch.equal(got.weights[name], weight), (mode, name)


# Low precision --------------------------------------------------------------------------------------------------------


LOW = [
    Case(precision=precision, stage=stage, ascent=ascent, config=config, rounding="stochastic", accumulation=2,
         loss_scale=8.0 if stage == 0 else 128.0, model="straddling", updates=7)
    for precision, stage, ascent, config in [
        ("bf16", 0, "rank", {}), ("bf16", 1, "micro_batch", {}), ("bf16", 2, "rank", {}),
        ("fp16", 0, "micro_batch", {}), ("fp16", 2, "rank", {}), ("bf16", 3, "global_micro_batch", {}),
        ("bf16", 1, "rank", {"data_types": {"grad_accum_dtype": "fp32"}}),
        ("bf16", 1, "global_micro_batch", {"data_types": {"grad_accum_dtype": "fp32"}})]
]


@pytest.mark.parametrize("case", LOW, ids=lambda case: f"{case.precision}-{_id(case)}")
def test_low_precision(case: Case) -> None:
    """A perturbation that is rounded at random is another one each time, by as much as a nearest one is off. The last
    update is a SAM step: what a rank kept of its own perturbation would show."""
    _, error, _ = compare_with_oracle(case)
    assert error <= 2 * rounding_tolerance(case)


def along_eps(engine: Any) -> float:
    """⟨Δw, eps⟩ / ‖eps‖² of a SAM step."""
    return float(engine.looksam.perturbation_ratio * engine.looksam.perturbation_cosine)


@pytest.mark.parametrize(("lr", "precision", "stage", "ascent"), [
    (0.0, "bf16", 1, "global"), (1e-2, "bf16", 2, "global"), (1e-6, "fp16", 2, "global"), (1e-6, "bf16", 0, "global"),
    (1e-6, "bf16", 3, "global"), (1e-6, "bf16", 2, "rank"), (1e-6, "bf16", 2, "micro_batch")])
def test_the_weights_move_by_eps_on_average(lr: float, precision: str, stage: int, ascent: str) -> None:
    """From weights that start on bf16's grid too, where rounding to nearest leaves many of them in their places."""
    case = Case(precision=precision, stage=stage, ascent=ascent, rounding="stochastic", model="straddling", rho=1e-3,
                k=1, loss_scale=128.0, updates=40, accumulation=2 if ascent == "micro_batch" else 1,
                options={"lr": lr, "weight_decay": 0.0})

    def in_standard_errors(case: Case) -> float:
        found = torch.tensor(run_on_ranks(2, train, case, after=along_eps)[0].history).double()
        standard_error = found.std() / len(found)**0.5
        assert standard_error < 0.1
        return float((found.mean() - 1) / standard_error)

    assert abs(in_standard_errors(case)) < 4
    if lr == 0:
        assert in_standard_errors(replace(case, rounding="nearest")) < -4


# Costs ----------------------------------------------------------------------------------------------------------------


def _sent(case: Case) -> tuple[Counter[str], list[Step]]:
    """Bulky collectives of a SAM step's whole window, by kind; and the windows."""
    steps: list[Step] = run_on_ranks(2, record_steps, case, True)[0]
    sam = steps[3].evaluation + steps[3].update
    return Counter(c.kind for c in sam if c.nbytes > 256), steps


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_collectives(stage: int) -> None:
    """Two micro-batches on two ranks."""
    case = Case(stage=stage, accumulation=2, k=3, alpha=0.7, updates=6, precision="bf16")
    sent, steps = _sent(case)
    gather = next(iter(sent - Counter({"allreduce": 99})), "nothing")
    assert sent[gather] == (2 if stage else 0), "published: w + eps, and the update"
    reductions = {0: 1, 1: 1, 2: 2}[stage]  # of a window
    assert sent["allreduce"] == 2 * reductions
    for mode, reduced, gathered in (("rank", 2 * reductions, 1), ("micro_batch", 4, 1), ("global_micro_batch", 4, 5)):
        found, others = _sent(replace(case, ascent=mode))
        assert (found["allreduce"], found[gather]) == (reduced, gathered if stage else 0), mode
        assert sum(found.values()) == reduced + (gathered if stage else 0), mode
        assert others[3].looked_at == 0, "what LookSAM does between micro-batches forms no loss"
        for ours, usual in zip(others[4:], steps[4:], strict=True):  # reuse
            assert (ours.evaluation, ours.update, ours.host_reads) == (usual.evaluation, usual.update, usual.host_reads)


# A rank's own gradient ------------------------------------------------------------------------------------------------


class Awkward(Mlp):
    """Half of a weight is not trained: the user's hook takes its gradient away. Activations are recomputed in backward,
    as ``backward(backward())`` or not; where not, the loss has the gradient of a weight in it, which
    torch.autograd.grad takes. ``plain``: what that comes to."""

    def __init__(self, reentrant: bool, plain: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.reentrant, self.plain = reentrant, plain
        self.register_buffer("trained", (torch.arange(self.second.weight.numel()) % 2).view_as(self.second.weight))
        if not plain:
            self.second.weight.register_hook(lambda g: g * self.trained)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().forward(x, y)
        if self.reentrant:
            return loss
        (gradient, ) = torch.autograd.grad(loss, [self.head.weight], create_graph=True)
        return loss + 0.1 * gradient.square().sum()

    def body(self, x: Tensor) -> Tensor:
        if self.plain:
            w = self.second.weight
            w = torch.where(self.trained > 0, w, w.detach())
            hidden = torch.tanh(self.first(x)) * self.scale
            return self.head(torch.tanh(nn.functional.linear(hidden, w, self.second.bias)))
        hidden = x.clone().requires_grad_()
        for part in (lambda h: torch.tanh(self.first(h)) * self.scale, lambda h: torch.tanh(self.second(h))):
            hidden = checkpoint(part, hidden, use_reentrant=self.reentrant)
        return self.head(hidden)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("ascent", "stage"), [("rank", 0), ("rank", 2), ("micro_batch", 1)])
def test_a_ranks_own_gradient_is_what_deepspeed_gets(reentrant: bool, ascent: str, stage: int) -> None:
    case = Case(stage=stage, accumulation=2, updates=5, ascent=ascent)
    _, expected = run_oracle(case, module=Awkward(reentrant, plain=True))
    for result in run_on_ranks(2, train, case, module=partial(Awkward, reentrant)):
        assert distance(result.weights, expected) <= TOLERANCE


def freeze(engine: Any) -> str:
    if engine.looksam.updates == 2:
        engine.module.first.requires_grad_(False)
    return engine.looksam.step_kind


def test_a_layer_may_be_frozen_midway() -> None:
    for result in run_on_ranks(2, train, Case(ascent="rank", updates=4, k=2), after=freeze):
        assert result.history == ["sam", "base", "sam", "reuse"]


# Losses, faults and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ascent", "stage", "how"), [
    ("rank", 2, "loss_fn"), ("rank", 0, "closure"), ("micro_batch", 2, "loss_fn"),
    ("global_micro_batch", 3, "loss_fn")])
def test_a_loss_formed_outside_the_model(ascent: str, stage: int, how: str) -> None:
    case = Case(world=2, accumulation=2, updates=5, k=2, alpha=0.7, stage=stage, ascent=ascent)
    assert distance(run_on_ranks(2, train_outside, case, how)[0], run_oracle(case)[1]) <= TOLERANCE


def _backward_within(engine: Any, loss: Tensor, context: str) -> None:
    with getattr(engine, context)():
        engine.backward(loss)


def _read_out(engine: Any, loss: Tensor) -> None:
    engine.backward(torch.tanh(loss) if loss.item() > 0 else loss)


WAYS: list[tuple[str, Callable[[Any, Tensor], None]]] = [
    ("coalesce_grad_reduction()", lambda engine, loss: _backward_within(engine, loss, "coalesce_grad_reduction")),
    ("call engine.backward(loss)", lambda engine, loss: loss.backward()),
    ("set engine.loss_fn", lambda engine, loss: engine.step(closure=lambda: None)),
    ("set engine.loss_fn", _read_out),
    # On stage 2 that is DeepSpeed's own refusal.
    ("engine.no_sync()", lambda engine, loss: _backward_within(engine, loss, "no_sync")),
]


def refused_per_micro_batch(case: Case) -> list[str]:
    """On a rank: what each way says. Then the run goes on, as one that nothing has befallen: its weights."""
    from ds_looksam import LookSAMReplayError

    told = []
    with engine_for(case, module=without_loss(case)) as engine:
        for update in range(case.updates):
            for x, y in batches_for(engine, case, update):
                for _, way in WAYS[:-1 if case.stage == 2 else None] if update == 0 else []:
                    with pytest.raises(LookSAMReplayError) as error:
                        way(engine, outside_loss(engine(x, y), x, y))
                    told.append(str(error.value))
                engine.backward(outside_loss(engine(x, y), x, y))
                engine.step()
        weights = master_weights(engine)
    assert distance(weights, run_oracle(case)[1]) <= TOLERANCE
    return told


@pytest.mark.parametrize("stage", [1, 2])
def test_what_cannot_be_done_per_micro_batch_is_refused(stage: int) -> None:
    """Each message has its way out, and none offers the closure."""
    words = [words for words, _ in WAYS[:-1 if stage == 2 else None]]
    for told in run_on_ranks(2, refused_per_micro_batch, Case(stage=stage, accumulation=2, ascent="micro_batch",
                                                              updates=3)):
        for message, expected in zip(told, 2 * words, strict=True):
            assert expected in message, message
            assert "closure" not in message or message.startswith("engine.step(closure"), message


class Broke(Exception):
    pass


def fails(case: Case, where: str) -> tuple[bool, dict[str, Tensor]]:
    """On a rank: the last evaluation of updates 0 and 2 (SAM steps) breaks, in step() or, where each micro-batch is
    evaluated again at once, in backward(), and is tried again. Whether that left everything as it was; the weights."""
    in_step = "micro_batch" not in case.ascent
    forwards_left = 0

    def explode(*_: Any) -> None:
        nonlocal forwards_left
        if forwards_left and is_evaluating_again(engine):
            forwards_left -= 1
            if not forwards_left:
                raise Broke

    with engine_for(case) as engine:
        head, untouched = engine.module.head, True
        head.register_forward_hook(explode) if where == "forward" else head.register_full_backward_hook(explode)
        for update in range(case.updates):
            for i, (x, y) in enumerate(batches_for(engine, case, update)):
                loss = engine(x, y)
                if in_step:
                    engine.backward(loss)
                if update in (0, 2) and i == case.accumulation - 1:
                    before, random = visible_weights(engine), torch.get_rng_state()
                    forwards_left = case.accumulation if in_step else 1
                    with pytest.raises(Broke):
                        engine.step() if in_step else engine.backward(loss)
                    untouched &= torch.equal(random, torch.get_rng_state()) and all(
                        torch.equal(before[name], w) for name, w in visible_weights(engine).items())
                    loss = loss if in_step else engine(x, y)
                if not in_step:
                    engine.backward(loss)
                engine.step()
        return untouched, master_weights(engine)


@pytest.mark.parametrize(("ascent", "stage"), [
    *(("global", stage) for stage in range(4)), ("rank", 0), ("rank", 2), ("micro_batch", 0), ("micro_batch", 1),
    ("global_micro_batch", 2), ("global_micro_batch", 3)])
def test_an_evaluation_that_raises_leaves_everything_as_it_was(ascent: str, stage: int) -> None:
    # With DeepSpeed's timers, which what raises must not leave running.
    case = Case(stage=stage, ascent=ascent, accumulation=2, updates=4, k=2, alpha=0.7,
                config={"wall_clock_breakdown": True})
    plain = run_on_ranks(2, train, case)
    for where in "forward", "backward":
        for (untouched, weights), expected in zip(run_on_ranks(2, fails, case, where), plain, strict=True):
            assert untouched, where
            assert all(torch.equal(weights[name], weight) for name, weight in expected.weights.items()), where
