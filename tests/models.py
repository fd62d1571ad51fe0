"""Small models with the shapes that break sharded optimizers. Each is called with (x, y) and returns its loss.

Nothing here has an exactly flat direction (a softmax's shift, say): there the true gradient is 0, what a run computes
is rounding noise, and Adam turns noise into steps of the full learning rate.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES, CLASSES = 7, 3


class Classifier(nn.Module):
    """A head with a smooth loss on top of :meth:`body`; the squared error has no flat direction."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.body(x)
        return F.mse_loss(out, F.one_hot(y, CLASSES).to(out.dtype))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Mlp(Classifier):
    """Odd sizes, and a one-element parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 13)
        self.scale = nn.Parameter(torch.ones(1))
        self.second = nn.Linear(13, 11)
        self.head = nn.Linear(11, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)) * self.scale)))


class DeadAndFrozen(Classifier):
    """A trainable layer that no loss depends on, and a layer in use that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 9)
        self.dead = nn.Linear(5, 3)
        self.frozen = nn.Linear(9, 9).requires_grad_(False)
        self.head = nn.Linear(9, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


class Tied(Classifier):
    """One weight used by two layers, each with its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, FEATURES)
        self.outer = nn.Linear(FEATURES, FEATURES)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))))


class Straddling(Classifier):
    """One tensor holds most of the elements, so it lies on several ranks of a ZeRO-1/2 partition."""

    def __init__(self, name: str = "big", width: int = 61) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(FEATURES, width, bias=False))
        self.head = nn.Linear(width, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.get_submodule(self.name)(x)) * 0.3)


class Tiny(Classifier):
    """Three elements: at world size 4 ranks own nothing but padding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.4, -0.3]))
        self.bias = nn.Parameter(torch.tensor([0.2]))

    def body(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x[:, :2] * self.weight + self.bias)
        return torch.cat([hidden, hidden[:, :1] * hidden[:, 1:]], dim=1)


class Stack(Classifier):
    """Layers of these widths, and a head."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        sizes = [FEATURES, *widths]
        self.hidden = ["first", "second", "third"][:len(widths)]
        for name, *size in zip(self.hidden, sizes, widths, strict=False):
            self.add_module(name, nn.Linear(*size))
        self.head = nn.Linear(sizes[-1], CLASSES)

    def body(self, x: Tensor) -> Tensor:
        for name in self.hidden:
            x = torch.tanh(self.get_submodule(name)(x))
        return self.head(x)


class Sometimes(Classifier):
    """A layer that takes part only in micro-batches whose first label is 0, which is so in one window and not in the
    next, on all ranks alike: where ranks disagree about it, DeepSpeed's own reduction deadlocks."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(9, 9)  # lies before those that always have a gradient
        self.first = nn.Linear(FEATURES, 9)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if bool(y[0] == 0):
            hidden = hidden + torch.tanh(self.extra(hidden))
        return F.mse_loss(self.head(hidden), F.one_hot(y, CLASSES).to(hidden.dtype))


class Random(Classifier):
    """A random stack: widths, activations, skips, dead, frozen, tied and one-element parameters all from ``seed``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        width = FEATURES
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.dead = nn.ModuleList(nn.Linear(draw.randint(1, 9), draw.randint(1, 5)) for _ in range(draw.randint(0, 2)))
        self.activations = []
        for _ in range(draw.randint(1, 4)):
            square = draw.random() < 0.4
            new = width if square else draw.randint(1, 31)
            layer = nn.Linear(width, new, bias=draw.random() < 0.7)
            # Not by weight.shape, which is (0,) under zero.Init.
            same_shape = [m for m in self.layers if (m.in_features, m.out_features) == (width, new)]
            if same_shape and draw.random() < 0.5:
                layer.weight = draw.choice(same_shape).weight
            elif draw.random() < 0.15:
                layer.requires_grad_(False)
            self.layers.append(layer)
            self.scales.append(nn.Parameter(torch.ones(1)) if draw.random() < 0.5 else nn.Parameter(torch.ones(new)))
            self.activations.append(draw.choice([torch.tanh, torch.sin, F.softplus]))
            width = new
        self.head = nn.Linear(width, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        for layer, scale, activation in zip(self.layers, self.scales, self.activations, strict=True):
            new = activation(layer(x)) * scale
            x = x + new if new.shape == x.shape else new
        return self.head(x)


ZOO = {
    "mlp": Mlp, "dead_and_frozen": DeadAndFrozen, "tied": Tied, "straddling": Straddling, "tiny": Tiny,
    "sometimes": Sometimes, "renamed": lambda: Straddling("large"), "reshaped": lambda: Straddling(width=62),
    # Two tensors of more than a MiB per rank at world size 2: what DeepSpeed's swapper moves to NVMe.
    "wide": lambda: Stack(700, 800, 700),
}


def make_model(name: str, seed: int = 0) -> nn.Module:
    """A model by name, its weights drawn from ``seed``: a name of ZOO, or "random-N" for architecture N."""
    torch.manual_seed(seed)
    return Random(int(name.removeprefix("random-"))) if name.startswith("random-") else ZOO[name]()
