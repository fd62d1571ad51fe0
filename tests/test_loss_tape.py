"""A loss formed outside the model is formed again, to the bit, or refused with the reason."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_pt_utils import LabelSmoother

from ds_looksam.errors import LookSAMReplayError
from ds_looksam.replay.recording import RecordedCall
from ds_looksam.replay.window import Backward, Window

CLASSES = 5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(7, 9)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(x))
        return {"logits": self.head(hidden), "hidden": hidden}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


X = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 3, 2, -100, 4, 1])
TEACHER = Model()  # its parameters require grad: users forget to freeze


def recorded(model: nn.Module, form: Callable[[Any], Tensor]) -> Window:
    """The window of one forward and ``engine.backward(form(its output))``."""
    window = Window()
    loss = form(window.add_forward(model, model, (X, ), {}, lambda *_: None))
    window.add_backward(loss, Backward(is_boundary=True))
    with window.not_recording():  # as in engine.step()
        window.check(None)
    return window


def formed_again(window: Window, model: nn.Module) -> Tensor:
    losses: list[Tensor] = []
    with window.not_recording():
        window.evaluate_again(model, lambda loss, how, retain_graph: losses.append(loss), None)
    assert len(losses) == 1
    return losses[0]


def calls_of(window: Window) -> list[RecordedCall]:
    return [step for step in window._steps(None) if isinstance(step, RecordedCall)]


@pytest.fixture(autouse=True)
def nothing_is_left_on_torchs_stack() -> Iterator[None]:
    yield
    gc.collect()
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()


def check_formed_again(model: nn.Module, form: Callable[[Any], Tensor]) -> Window:
    """Value and gradients of the replayed loss at other weights are those of the user's own code there."""
    torch.manual_seed(5)
    window = recorded(model, form)
    with window.not_recording():
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.3)
        torch.manual_seed(5)
        expected = form(model(X))
        gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
        torch.manual_seed(6)  # the recording must bring its own random numbers
        got = formed_again(window, model)
        assert torch.equal(got, expected)
        got_gradients = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)
    for a, b in zip(got_gradients, gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    window.forget()
    assert torch._C._len_torch_function_stack() == 0
    return window


def label_smoothing(out):
    return LabelSmoother(0.1)(out, Y.clone())


def in_place(out):
    logits = out["logits"]
    logits[:, 0] = -3.0
    picked = logits.gather(1, Y.clamp(min=0)[:, None]).squeeze(1)
    picked.masked_fill_(Y == -100, 0.0)
    return -picked.sum()


def through_a_view(out):
    flat = out["logits"].view(-1)
    flat[3:11].mul_(0.5)
    return out["logits"].square().mean()


def detached_target(out):
    target = out["hidden"].detach().softmax(-1)
    return F.kl_div(out["hidden"].log_softmax(-1), target * 0.9, reduction="batchmean")


def dropout_outside(out):
    return F.cross_entropy(F.dropout(out["logits"], 0.4), Y)


def metrics_in_between(out):
    with torch.no_grad():
        correct = torch.zeros(())
        correct += (out["logits"].argmax(-1) == Y).sum()
        correct /= 3
    loss = F.cross_entropy(out["logits"], Y)
    total = 0.0
    total += loss.item()
    return loss / 4


def distillation(out):
    with torch.no_grad():
        teacher = TEACHER(X)["logits"]
    return F.mse_loss(out["logits"], teacher) + 0.1 * F.cross_entropy(out["logits"], Y)


def focal(out):
    p = F.softmax(out["logits"], dim=-1).gather(1, Y.clamp(min=0).unsqueeze(1)).squeeze(1)
    return (-((1 - p)**2) * p.log()).mean()


def under_autocast(out):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = out["hidden"] @ out["hidden"].T
    return similarity.float().logsumexp(-1).mean()


def through_modes(out):
    with torch.device("cpu"):
        weight = torch.ones(CLASSES)
        return F.cross_entropy(out["logits"], Y, weight=weight)


def own_parameters(model):
    def form(out):
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(out["logits"], Y) + 0.01 * penalty
    return form


FORMS = [label_smoothing, in_place, through_a_view, detached_target, dropout_outside, metrics_in_between, distillation,
         focal, under_autocast, through_modes]


@pytest.mark.parametrize("form", FORMS)
def test_formed_again_to_the_bit(model, form):
    check_formed_again(model, form)


def test_the_models_own_parameters_count(model):
    check_formed_again(model, own_parameters(model))


def test_only_what_the_loss_needs_is_called_again(model):
    window = recorded(model, metrics_in_between)
    assert len(calls_of(window)) == 2  # cross_entropy, the division: not the metrics


def test_a_teacher_is_not_evaluated_again(model):
    window = recorded(model, distillation)
    assert not any("linear" in call.name for call in calls_of(window))


def test_parameters_outside_the_model_get_no_second_gradient(model):
    centers = nn.Parameter(torch.zeros(9))
    window = recorded(model, lambda out: (out["hidden"] - centers * 2 + centers).square().sum())
    formed_again(window, model).backward()
    assert centers.grad is None
    assert model.body.weight.grad is not None


@pytest.mark.parametrize("wrap", [
    lambda out: out, lambda out: tuple(out.values()), lambda out: [out], lambda out: SequenceClassifierOutput(
        logits=out["logits"])
])
def test_outputs_of_every_kind(model, wrap):
    class Wrapped(Model):
        def forward(self, x):
            return wrap(super().forward(x))

    def form(out):
        while not isinstance(out, Tensor):
            out = next(iter(out.values())) if hasattr(out, "values") else out[0]
        return out.square().mean()

    check_formed_again(Wrapped(), form)


@dataclass
class Output:
    logits: Tensor


def test_outputs_that_are_objects():
    class Wrapped(Model):
        def forward(self, x):
            return Output(**{"logits": super().forward(x)["logits"]})

    check_formed_again(Wrapped(), lambda out: out.logits.square().mean())


# What cannot be formed again is refused -------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Its backward is not that of the operations in its forward."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def branch(out):
    loss = F.cross_entropy(out["logits"], Y)
    if loss > 1:
        loss = loss + out["hidden"].mean()
    return loss


def with_numpy(out):
    weight = torch.from_numpy(out["logits"].detach().numpy().max(0))
    return F.cross_entropy(out["logits"], Y, weight=weight.abs())


def hidden_in_data(out):
    out["logits"].data = torch.zeros(6, CLASSES)
    return F.cross_entropy(out["logits"], Y)


RUNNING_MEAN, RUNNING_VAR = torch.zeros(9), torch.ones(9)


def updates_statistics(out):
    return F.batch_norm(out["hidden"], RUNNING_MEAN, RUNNING_VAR, training=True).pow(3).mean()


def functional_penalty(out, model=None):
    def of_one(x):
        return model(x)["logits"].sum()

    return F.cross_entropy(out["logits"], Y) + torch.func.vmap(torch.func.grad(of_one))(X).square().mean()


def hooked(out):
    out["logits"].register_hook(lambda gradient: gradient * 2)
    return F.cross_entropy(out["logits"], Y)


REFUSED = {
    "custom function": (lambda out: Doubled.apply(out["logits"]).square().mean(), "autograd"),
    "branch": (branch, r"read out to Python \(torch.Tensor.__bool__\)"),
    "numpy": (with_numpy, "read out to Python"),
    "data": (hidden_in_data, "read out to Python"),
    "batch norm": (updates_statistics, "batch_norm may update running statistics"),
    "hook": (hooked, "hook"),
    "unrelated": (lambda out: nn.Parameter(torch.ones(())) * 2, "does not come from"),
    "unseen": (lambda out: torch.ones((), requires_grad=True), "does not come from"),
    "torch.func": (functional_penalty, "torch.func"),
}


@pytest.mark.parametrize(("form", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(model, form, reason):
    with pytest.raises(LookSAMReplayError, match=reason):
        recorded(model, form if form is not functional_penalty else lambda out: functional_penalty(out, model))


def test_shapes_that_depend_on_the_output_are_refused(model):
    def form(out):
        logits = out["logits"]
        return logits[logits > 0.1].sum()

    window = recorded(model, form)
    with torch.no_grad():
        model.head.bias.add_(0.3)
    with pytest.raises(LookSAMReplayError, match="depend on the model's output"):
        formed_again(window, model)


def test_labels_changed_since_are_refused(model):
    labels = Y.clone()
    window = recorded(model, lambda out: F.cross_entropy(out["logits"], labels))
    labels.zero_()
    with pytest.raises(LookSAMReplayError, match="changed in place"):
        window.check(None)


# The tape leaves nothing behind ---------------------------------------------------------------------------------------


def test_modes_entered_and_left_around_the_tape(model):
    window = Window()
    with torch.device("cpu"), torch.overrides.BaseTorchFunctionMode():
        output = window.add_forward(model, model, (X, ), {}, lambda *_: None)
    loss = output["logits"].square().mean()
    with window.not_recording():
        output["logits"].sum().item()
    with torch.overrides.BaseTorchFunctionMode():
        window.add_backward(loss, Backward(is_boundary=True))
        window.check(None)
    assert len(calls_of(window)) == 2
    window.forget()
    assert torch._C._len_torch_function_stack() == 0


def test_a_dropped_forward_is_freed(model):
    """Its output, what was made of it, and its input."""
    window = Window()
    batch = X.clone()
    output = window.add_forward(model, model, (batch, ), {}, lambda *_: None)
    metric = output["logits"].exp()
    metric.sum().item()
    alive = [weakref.ref(t) for t in (batch, output["logits"], metric)]
    del batch, output, metric
    window.add_forward(model, model, (X, ), {}, lambda *_: None)  # the newest is kept
    assert not any(ref() is not None for ref in alive)
    window.forget()


def test_a_loss_that_is_kept_keeps_nothing_of_its_window(model):
    window = Window()
    batch, labels = X.clone(), Y.clone()
    loss = F.cross_entropy(window.add_forward(model, model, (batch, ), {}, lambda *_: None)["logits"], labels)
    window.add_backward(loss, Backward(is_boundary=True))
    loss.backward()
    alive = weakref.ref(batch), weakref.ref(labels)
    window.forget()
    del batch, labels
    gc.collect()
    assert loss.grad_fn is not None and not any(ref() is not None for ref in alive)
