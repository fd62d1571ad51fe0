"""A loss formed outside the model is formed again, to the bit, or refused with the reason."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import make_dataclass
from typing import Any

import numpy as np
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
X = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 3, 2, -100, 4, 1])
Output = make_dataclass("Output", ["logits", "hidden"])


class Model(nn.Module):
    """``wrap``: what it returns, made of logits and hidden."""

    def __init__(self, wrap=dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.wrap = nn.Linear(7, 9), nn.Linear(9, CLASSES), wrap

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        return self.wrap({"logits": self.head(hidden), "hidden": hidden})


TEACHER = Model()  # its parameters require grad: users forget to freeze


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture(autouse=True)
def nothing_is_left_on_torchs_stack() -> Iterator[None]:
    yield
    gc.collect()
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()


def forward(window: Window, model: nn.Module, x: Tensor = X) -> Any:
    return window.add_forward(model, model, (x, ), {}, lambda *_: nullcontext())


def recorded(model: nn.Module, form: Callable[..., Tensor]) -> Window:
    """The window of one forward and ``engine.backward(form(its output, model))``."""
    window = Window()
    window.add_backward(form(forward(window, model), model), Backward(is_boundary=True, accumulation=1))
    with window.not_recording():  # as in engine.step()
        window.check(None)
    return window


def formed_again(window: Window, model: nn.Module) -> Tensor:
    losses: list[Tensor] = []
    with window.not_recording():
        window.evaluate_again(model, lambda loss, how, retain_graph: losses.append(loss), None)
    [loss] = losses
    return loss


def calls_of(window: Window) -> list[RecordedCall]:
    return [step for step in window._steps(None) if isinstance(step, RecordedCall)]


# Formed again ---------------------------------------------------------------------------------------------------------


def cross_entropy(out: Any, model: Any = None) -> Tensor:
    return F.cross_entropy(out["logits"], Y)


def in_place(out, model):
    logits = out["logits"]
    logits[:, 0] = -3.0
    picked = logits.gather(1, Y.clamp(min=0)[:, None]).squeeze(1)
    picked.masked_fill_(Y == -100, 0.0)
    return -picked.sum()


def through_a_view(out, model):
    out["logits"].view(-1)[3:11].mul_(0.5)
    return out["logits"].square().mean()


def metrics_in_between(out, model):
    with torch.no_grad():
        correct = torch.zeros(())
        correct += (out["logits"].argmax(-1) == Y).sum()
        correct /= 3
    loss = cross_entropy(out)
    total = 0.0
    total += loss.item()
    return loss / 4


def metrics_before_the_mean(out, model):
    """As preference losses do."""
    losses = F.cross_entropy(out["logits"], Y, reduction="none")
    losses.detach().max().item()
    return torch.sum(losses.mean()) / 4 / torch.tensor(3.0)


def distillation(out, model):
    with torch.no_grad():
        teacher = TEACHER(X)["logits"]
    return F.mse_loss(out["logits"], teacher) + 0.1 * cross_entropy(out)


def under_autocast(out, model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = out["hidden"] @ out["hidden"].T
    return similarity.float().logsumexp(-1).mean()


def through_modes(out, model):
    with torch.device("cpu"):
        return F.cross_entropy(out["logits"], Y, weight=torch.ones(CLASSES))


FORMED = {
    **{form.__name__: (dict, form) for form in (in_place, through_a_view, metrics_in_between, metrics_before_the_mean,
                                                distillation, under_autocast, through_modes)},
    "label smoothing": (dict, lambda out, model: LabelSmoother(0.1)(out, Y.clone())),
    "dropout": (dict, lambda out, model: F.cross_entropy(F.dropout(out["logits"], 0.4), Y)),
    "own parameters": (dict, lambda out, model: cross_entropy(out) + 0.01 * sum(
        p.square().sum() for p in model.parameters())),
    "of a tuple": (lambda out: tuple(out.values()), lambda out, model: out[0].square().mean()),
    "of mappings": (lambda out: [out], lambda out, model: out[0]["logits"].square().mean()),
    "of transformers'": (lambda out: SequenceClassifierOutput(logits=out["logits"]),
                         lambda out, model: out.logits.square().mean()),
    "of an object": (lambda out: Output(**out), lambda out, model: out.logits.square().mean()),
}


@pytest.mark.parametrize("wrap, form", FORMED.values(), ids=FORMED.keys())
def test_formed_again_to_the_bit(wrap, form):
    """Value and gradients of the replayed loss at other weights are those of the user's own code there."""
    model = Model(wrap)
    torch.manual_seed(5)
    window = recorded(model, form)
    with window.not_recording():
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.3)
        torch.manual_seed(5)
        expected = form(model(X), model)
        gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
        torch.manual_seed(6)  # the recording must bring its own random numbers
        got = formed_again(window, model)
        assert torch.equal(got, expected)
        got_gradients = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)
    for a, b in zip(got_gradients, gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    window.forget()
    assert torch._C._len_torch_function_stack() == 0


def test_only_what_the_loss_needs_is_called_again(model):
    assert len(calls_of(recorded(model, metrics_in_between))) == 2  # cross_entropy, the division: not the metrics
    assert not any("linear" in call.name for call in calls_of(recorded(model, distillation)))  # not the teacher


def test_parameters_outside_the_model_get_no_second_gradient(model):
    centers = nn.Parameter(torch.zeros(9))
    window = recorded(model, lambda out, model: (out["hidden"] - centers * 2 + centers).square().sum())
    formed_again(window, model).backward()
    assert centers.grad is None and model.body.weight.grad is not None


# What cannot be formed again is refused -------------------------------------------------------------------------------


def with_numpy(out, model):
    weight = torch.from_numpy(out["logits"].detach().numpy().max(0))
    return F.cross_entropy(out["logits"], Y, weight=weight.abs())


def pickled(out, model):
    """As torch.distributed.all_gather_object does."""
    return F.cross_entropy(out["logits"], Y, weight=pickle.loads(pickle.dumps(out["logits"].detach().abs()))[0])


def queued(out, model):
    queue = torch.zeros(8, CLASSES)
    queue[:6].copy_(out["logits"].detach())
    return (out["logits"] @ queue.T).square().mean()


def hidden_in_data(out, model):
    out["logits"].data = torch.zeros(6, CLASSES)
    return cross_entropy(out)


def functional_penalty(out, model):
    of_each = torch.func.vmap(torch.func.grad(lambda x: model(x)["logits"].sum()))(X)
    return cross_entropy(out) + of_each.square().mean()


def hooked(out, model):
    out["logits"].register_hook(lambda gradient: gradient * 2)
    return cross_entropy(out)


@pytest.mark.parametrize("form, reason", [
    (lambda out, model: cross_entropy(out) + (out["hidden"].mean() if out["hidden"].mean() < 1 else 0.0),
     r"read out to Python \(torch.Tensor.__bool__\)"),
    *((lambda out, model, make=make: (loss := cross_entropy(out)) / make(loss), "read out to Python") for make in (
        lambda loss: np.float32(loss.item()), lambda loss: torch.tensor(loss.item()),
        lambda loss: torch.from_dlpack(loss.detach()), lambda loss: torch.ones(()).fill_(loss.item()))),
    (with_numpy, "read out to Python"), (pickled, "read out to Python .*untyped_storage"),
    (lambda out, model: out["logits"].mean(int(out["logits"].max() > 9)).sum(), r"came later.*what your code did"),
    (hidden_in_data, "read out to Python"),
    (lambda out, model: F.batch_norm(out["hidden"], torch.zeros(9), torch.ones(9), training=True).pow(3).mean(),
     "batch_norm may update running statistics"),
    (hooked, "hook"), (queued, "into which a value that depends on its output was written"),
    (lambda out, model: nn.Parameter(torch.ones(())) * 2, "does not come from"),
    (lambda out, model: torch.ones((), requires_grad=True), "does not come from"),
    (functional_penalty, "torch.func"),
])
def test_refused(model, form, reason):
    with pytest.raises(LookSAMReplayError, match=reason):
        recorded(model, form)


def test_refused_when_formed_again(model):
    labels = Y.clone()
    window = recorded(model, lambda out, model: F.cross_entropy(out["logits"], labels))
    labels.zero_()
    with pytest.raises(LookSAMReplayError, match="changed in place"):
        window.check(None)
    window.forget()
    window = recorded(model, lambda out, model: out["logits"][out["logits"] > 0.1].sum())
    with torch.no_grad():
        model.head.bias.add_(0.3)
    with pytest.raises(LookSAMReplayError, match="depend on the model's output"):
        formed_again(window, model)


# The tape leaves nothing behind ---------------------------------------------------------------------------------------


def test_modes_entered_and_left_around_the_tape(model):
    window = Window()
    with torch.device("cpu"), torch.overrides.BaseTorchFunctionMode():
        output = forward(window, model)
    loss = output["logits"].square().mean()
    with window.not_recording():
        output["logits"].sum().item()
    with torch.overrides.BaseTorchFunctionMode():
        window.add_backward(loss, Backward(is_boundary=True, accumulation=1))
        window.check(None)
    assert len(calls_of(window)) == 2
    window.forget()
    assert torch._C._len_torch_function_stack() == 0


def test_a_dropped_forward_is_freed(model):
    """Its output, what was made of it, and its input."""
    window, batch = Window(), X.clone()
    output = forward(window, model, batch)
    metric = output["logits"].exp()
    metric.sum().item()
    alive = [weakref.ref(t) for t in (batch, output["logits"], metric)]
    del batch, output, metric
    forward(window, model)  # the newest is kept
    assert not any(ref() is not None for ref in alive)
    window.forget()


def test_a_loss_that_is_kept_keeps_nothing_of_its_window(model):
    window, batch, labels = Window(), X.clone(), Y.clone()
    loss = F.cross_entropy(forward(window, model, batch)["logits"], labels)
    window.add_backward(loss, Backward(is_boundary=True, accumulation=1))
    loss.backward()
    alive = weakref.ref(batch), weakref.ref(labels)
    window.forget()
    del batch, labels
    gc.collect()
    assert loss.grad_fn is not None and not any(ref() is not None for ref in alive)
