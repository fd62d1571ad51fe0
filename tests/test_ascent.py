"""Ascent groups (the JSON key ``ascent``): a perturbation per rank, per micro-batch, or per accumulation step of all.

CI runs a subset in which every pair of settings occurs; ``pytest -m grid`` runs the whole grid. Faults of the second
evaluation and interruptions are also in test_checkpoint_broken.py, test_overflow.py and test_faults.py, resuming is in
test_checkpoint.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import oracle
from .costs import Step, record_steps
from .covering import covering, product
from .fuzz import rounding_tolerance
from .inside import is_evaluating_again
from .models import Classifier, Mlp
from .ranks import run_on_ranks
from .test_accumulation import WAYS, accumulate
from .test_oracle_grid import TOLERANCE
from .test_replay import (
    ReplayBroke,
    Returning,
    fails_in_the_replay,
    outside_loss,
    train_outside,
    train_plainly,
)
from .training import (
    Case,
    check_against_oracle,
    compare_with_oracle,
    distance,
    engine_for,
    master_weights,
    named,
    run_oracle,
    train,
    train_window,
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


def _cases(rows: Iterable[dict[str, Any]]) -> list[Case]:
    """Stage 3's weights are shared: it has "global_micro_batch" alone."""
    return [Case(**{key: value for key, value in row.items() if key != "schedule"}, updates=9,
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
@pytest.mark.parametrize("case", _cases(product({
    **GRID, "layer_scale": [None, "norm"], "base": ["AdamW"], "k": [3], "model": ["mlp", "straddling", "sometimes"],
    "schedule": ["constant"]})), ids=_id)
def test_matches_oracle_everywhere(case: Case) -> None:
    check_against_oracle(case, TOLERANCE)


SETTINGS: list[dict[str, Any]] = [
    {"zero": OFFLOAD, "stage": 1}, {"zero": OFFLOAD, "stage": 2},
    {"zero": {"round_robin_gradients": True}},
    {"zero": {"overlap_comm": True, "reduce_bucket_size": 50}},
    {"params": {"compile": True}, "model": "mlp"},
    {"base": "Lars", "layer_scale": "norm"},
    {"zero": {"stage3_param_persistence_threshold": 0}, "stage": 3},
    {"zero": {"zero_hpz_partition_size": 2}, "stage": 3, "zero_init": True},
    {"zero": {**OFFLOAD, "offload_param": {"device": "cpu"}}, "stage": 3, "zero_init": True},
]


@pytest.mark.parametrize("case", [
    Case(**{"model": "straddling", "stage": 2, "accumulation": 2, "clipping": 0.05, "updates": 7, "ascent": ascent,
            **settings})
    for settings in SETTINGS for ascent in (["global_micro_batch"] if settings.get("stage") == 3 else MODES[1:3])],
    ids=_id)
def test_options(case: Case) -> None:
    check_against_oracle(case, 3 * TOLERANCE)  # DeepSpeedCPUAdam: see test_options


# The same bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layer_scale", [None, "norm", "relative", "gradient"])
def test_one_micro_batch_on_one_rank_is_one_group_in_every_mode(stage: int, layer_scale: str | None) -> None:
    case = Case(world=1, stage=stage, layer_scale=layer_scale, two_groups=True, model="tied", updates=7,
                rho=0.01 if layer_scale == "relative" else 0.1)
    (expected, ) = run_on_ranks(1, train, case)
    for mode in MODES[1:] if stage < 3 else MODES[3:]:
        (got, ) = run_on_ranks(1, train, replace(case, ascent=mode))
        for name, weight in expected.weights.items():
            assert torch.equal(got.weights[name], weight), (mode, name)


def seen_by_users(case: Case) -> list[dict[str, Tensor]]:
    """On a rank: the model's weights after every update."""
    with engine_for(case) as engine:
        seen = []
        for update in range(case.updates):
            train_window(engine, case, update)
            seen.append(visible_weights(engine))
        return seen


@pytest.mark.parametrize("ascent", ["rank", "micro_batch"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ranks_hold_the_same_bits_after_every_update(stage: int, ascent: str) -> None:
    case = Case(stage=stage, ascent=ascent, precision="bf16", rounding="stochastic", updates=5, accumulation=2, k=2)
    ours, theirs = run_on_ranks(2, seen_by_users, case)
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


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
    """A perturbation that is rounded at random is another one each time, by as much as a nearest one is off."""
    _, error, _ = compare_with_oracle(case)
    assert error <= 2 * rounding_tolerance(case)


def products(case: Case) -> list[float]:
    """On a rank: ⟨Δw, eps⟩ / ‖eps‖² of each SAM step."""
    with engine_for(case) as engine:
        found = []
        for update in range(case.updates):
            train_window(engine, case, update)
            found.append(float(engine.looksam.perturbation_ratio * engine.looksam.perturbation_cosine))
        return found


@pytest.mark.parametrize(("lr", "precision", "stage", "ascent"), [
    (0.0, "bf16", 1, "global"), (1e-6, "bf16", 2, "global"), (1e-2, "bf16", 2, "global"), (1e-6, "fp16", 2, "global"),
    (1e-6, "bf16", 0, "global"), (1e-6, "bf16", 3, "global"), (1e-6, "bf16", 0, "rank"), (1e-6, "bf16", 2, "rank"),
    (1e-2, "bf16", 2, "rank"), (1e-6, "bf16", 2, "micro_batch"), (1e-6, "bf16", 3, "global_micro_batch")])
def test_the_weights_move_by_eps_on_average(lr: float, precision: str, stage: int, ascent: str) -> None:
    """From weights that start on bf16's grid too, where rounding to nearest leaves many of them in their places."""
    case = Case(precision=precision, stage=stage, ascent=ascent, rounding="stochastic", model="straddling", rho=1e-3,
                k=1, loss_scale=128.0, updates=40, accumulation=2, options={"lr": lr, "weight_decay": 0.0})

    def in_standard_errors(case: Case) -> float:
        found = torch.tensor(run_on_ranks(2, products, case)[0]).double()
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
        for ours, usual in zip(others[4:], steps[4:], strict=True):  # reuse
            assert (ours.evaluation, ours.update, ours.host_reads) == (usual.evaluation, usual.update, usual.host_reads)


# Ways of training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ascent", "way", "stage"), [
    *(("rank", way, 1) for way in WAYS), ("rank", "unmanaged", 2), ("rank", "unmanaged", 0), ("rank", "coalesced", 2),
    *((ascent, way, stage) for ascent, stage in (("micro_batch", 2), ("micro_batch", 0), ("global_micro_batch", 3))
      for way in ("boundary_set_by_hand", "unmanaged"))])
def test_ways_to_accumulate(ascent: str, way: str, stage: int) -> None:
    case = Case(stage=stage, accumulation=3, clipping=0.05, updates=7, ascent=ascent)
    reference, expected = run_oracle(case)
    for result in run_on_ranks(2, accumulate, case, way):
        assert distance(result.weights, expected) <= TOLERANCE
        assert (result.updates, result.evaluations) == (case.updates, reference.evaluations)


class Checkpointed(Mlp):
    """Activations are recomputed in backward, as ``backward(backward())`` or not."""

    reentrant: bool

    def body(self, x: Tensor) -> Tensor:
        hidden = x.clone().requires_grad_()
        for part in (lambda h: torch.tanh(self.first(h)) * self.scale, lambda h: torch.tanh(self.second(h))):
            hidden = checkpoint(part, hidden, use_reentrant=self.reentrant)
        return self.head(hidden)


class Reentrant(Checkpointed):
    reentrant = True


class NotReentrant(Checkpointed):
    reentrant = False


class Penalized(Mlp):
    """The loss has the gradient of a weight in it, which torch.autograd.grad takes."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().forward(x, y)
        (gradient, ) = torch.autograd.grad(loss, [self.head.weight], create_graph=True)
        return loss + 0.1 * gradient.square().sum()


class Masked(Mlp):
    """Half of a weight is not trained: the user's hook takes its gradient away."""

    def __init__(self) -> None:
        super().__init__()
        self.second.weight.register_hook(lambda g: g * _half_of(g))


class HalfTrained(Mlp):
    """What that comes to."""

    def body(self, x: Tensor) -> Tensor:
        w, mask = self.second.weight, _half_of(self.second.weight)
        w = mask * w + ((1 - mask) * w).detach()
        return self.head(torch.tanh(nn.functional.linear(torch.tanh(self.first(x)) * self.scale, w, self.second.bias)))


def _half_of(x: Tensor) -> Tensor:
    return (torch.arange(x.numel()).view_as(x) % 2).to(x.dtype)


def build(kind: type[Classifier]) -> Classifier:
    torch.manual_seed(0)
    return kind()


def train_module(case: Case, kind: type[Classifier]) -> dict[str, Tensor]:
    with engine_for(case, module=build(kind)) as engine:
        for update in range(case.updates):
            train_window(engine, case, update)
        return master_weights(engine)


@pytest.mark.parametrize(("kind", "plain"), [(Reentrant, Mlp), (NotReentrant, Mlp), (Penalized, Penalized),
                                             (Masked, HalfTrained)])
@pytest.mark.parametrize(("ascent", "stage"), [("rank", 0), ("rank", 2), ("micro_batch", 1)])
def test_a_ranks_own_gradient_is_what_deepspeed_gets(kind: type[Classifier], plain: type[Classifier], ascent: str,
                                                     stage: int) -> None:
    case = Case(stage=stage, accumulation=2, updates=5, ascent=ascent)
    module = build(plain)
    groups = case.oracle_groups(module)
    reference = oracle.build(module, groups, base=case.base, k=case.k)
    reference.groups_of = case.ascent_groups
    for update in range(case.updates):
        reference.update(case.window(update))
    expected = named(reference.w, module, groups)
    for weights in run_on_ranks(2, train_module, case, kind):
        assert distance(weights, expected) <= TOLERANCE


def freeze_midway(case: Case) -> list[str]:
    with engine_for(case) as engine:
        kinds = []
        for update in range(case.updates):
            if update == 2:
                engine.module.first.requires_grad_(False)
            train_window(engine, case, update)
            kinds.append(engine.looksam.step_kind)
        return kinds


def test_a_layer_may_be_frozen_midway() -> None:
    assert run_on_ranks(2, freeze_midway, Case(ascent="rank", updates=4, k=2)) == [["sam", "base", "sam", "reuse"]] * 2


# Losses, faults and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ascent", "stage", "how"), [
    ("rank", 2, "loss_fn"), ("rank", 0, "closure"), ("micro_batch", 2, "loss_fn"),
    ("global_micro_batch", 3, "loss_fn")])
def test_a_loss_formed_outside_the_model(ascent: str, stage: int, how: str) -> None:
    case = Case(world=2, accumulation=2, updates=5, k=2, alpha=0.7, stage=stage, ascent=ascent)
    assert distance(run_on_ranks(2, train_outside, case, how)[0], run_oracle(case)[1]) <= TOLERANCE


def _backward(engine: Any, loss: Tensor) -> None:
    engine.backward(loss)


def _no_sync(engine: Any, loss: Tensor) -> None:
    with engine.no_sync():
        engine.backward(loss)


def _coalesce(engine: Any, loss: Tensor) -> None:
    with engine.coalesce_grad_reduction():
        engine.backward(loss)


def _directly(engine: Any, loss: Tensor) -> None:
    loss.backward()


def _with_closure(engine: Any, loss: Tensor) -> None:
    engine.step(closure=lambda: None)


def _read_out(engine: Any, loss: Tensor) -> None:
    engine.backward(torch.tanh(loss) if loss.item() > 0 else loss)


def refused_per_micro_batch(case: Case, ways: list[Callable[[Any, Tensor], None]]) -> list[str]:
    """On a rank: what each way says. Then the run goes on, as one that nothing has befallen: its weights."""
    from ds_looksam import LookSAMReplayError

    told = []
    with engine_for(case, module=Returning("logits")) as engine:
        for update in range(case.updates):
            for x, y in case.micro_batches(update, torch.distributed.get_rank()):
                for way in ways if update == 0 else []:
                    try:
                        way(engine, outside_loss(engine(x.float(), y), x.float(), y))
                        told.append("went through")
                    except LookSAMReplayError as error:
                        told.append(str(error))
                _backward(engine, outside_loss(engine(x.float(), y), x.float(), y))
                engine.step()
        weights = {name.removeprefix("model."): w for name, w in master_weights(engine).items()}
    assert distance(weights, run_oracle(case)[1]) <= TOLERANCE
    return told


@pytest.mark.parametrize("stage", [1, 2])
def test_what_cannot_be_done_per_micro_batch_is_refused(stage: int) -> None:
    """Each message has its way out, and none offers the closure."""
    case = Case(stage=stage, accumulation=2, ascent="micro_batch", updates=3)
    ways = {_no_sync: "engine.no_sync()", _coalesce: "coalesce_grad_reduction()",
            _directly: "call engine.backward(loss)", _with_closure: "set engine.loss_fn",
            _read_out: "set engine.loss_fn"}
    if stage == 2:
        del ways[_no_sync]  # DeepSpeed's own refusal
    for told in run_on_ranks(2, refused_per_micro_batch, case, list(ways)):
        for message, words in zip(told, [*ways.values()] * 2, strict=True):
            assert words in message, message
            assert "closure" not in message or message.startswith("engine.step(closure"), message


def fails_in_backward(case: Case, where: str) -> dict[str, Any]:
    """On a rank: the last micro-batch of updates 0 and 2 (SAM steps) breaks in its second evaluation on every rank, and
    is tried again."""
    rank = torch.distributed.get_rank()
    armed = False

    def explode(*_: Any) -> None:
        if armed and is_evaluating_again(engine):
            raise ReplayBroke(where)

    with engine_for(case) as engine:
        head, untouched = engine.module.head, True
        head.register_forward_hook(explode) if where == "forward" else head.register_full_backward_hook(explode)
        for update in range(case.updates):
            for i, (x, y) in enumerate(case.micro_batches(update, rank)):
                if update in (0, 2) and i == case.accumulation - 1:
                    before, armed = visible_weights(engine), True
                    loss, random = engine(x.float(), y), torch.get_rng_state()
                    with pytest.raises(ReplayBroke):
                        engine.backward(loss)
                    armed = False
                    untouched &= torch.equal(random, torch.get_rng_state()) and all(
                        torch.equal(before[name], w) for name, w in visible_weights(engine).items())
                engine.backward(engine(x.float(), y))
                engine.step()
        return {"untouched": untouched, "weights": master_weights(engine)}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("ascent", "stage"), [("rank", 0), ("rank", 2), ("micro_batch", 0), ("micro_batch", 1),
                                               ("global_micro_batch", 2), ("global_micro_batch", 3)])
def test_an_evaluation_that_raises_leaves_everything_as_it_was(ascent: str, stage: int, where: str) -> None:
    case = Case(stage=stage, ascent=ascent, accumulation=2, updates=4, k=2, alpha=0.7)
    failed = (run_on_ranks(2, fails_in_the_replay, case, None, where) if ascent == "rank" else
              run_on_ranks(2, fails_in_backward, case, where))
    for result, expected in zip(failed, run_on_ranks(2, train_plainly, case), strict=True):
        assert result["untouched"]
        assert all(torch.equal(result["weights"][name], weight) for name, weight in expected.items())
