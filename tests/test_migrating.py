"""docs/migrating.md: the rule of the other library, and the JSON that the page gives for it, end with the same weights.

The rules are written anew, in float64, with the optimizers of the page's "Before": torch's, with their defaults.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .ranks import run_on_ranks
from .test_docs import ROOT, as_object, blocks

TOLERANCE = 1e-5
"""fp32 against float64 over some twenty updates of a small model, as in the oracle grid."""


def after(section: str) -> dict[str, Any]:
    """The configuration below a heading of the page."""
    page = ROOT / "docs" / "migrating.md"
    start = page.read_text().splitlines().index(f"## {section}") + 1
    return as_object(next(b for b in blocks(page) if b.line > start and b.language == "json"))


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(12, 5, bias=bias)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of 23 updates: three SAM steps at the page's k of 10. Inputs so large that gradients are longer than 1, where
    DeepSpeed's default clipping binds."""
    generator = torch.Generator().manual_seed(1)
    return [(6 * torch.randn(128, 12, generator=generator, dtype=torch.float64),
             torch.randint(5, (128, ), generator=generator)) for _ in range(23)]


def weights_of(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])


# The rules ------------------------------------------------------------------------------------------------------------


def evaluate(module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    module.zero_grad()
    cross_entropy(module(x), y).backward()
    return [p.grad.clone() for p in module.parameters()]


def at_perturbed(module: nn.Module, g: list[Tensor], rho: float, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradient at w + rho g / ‖g‖; it stays in ``p.grad``."""
    clean = [p.detach().clone() for p in module.parameters()]
    norm = torch.stack([part.norm() for part in g]).norm()
    for p, part in zip(module.parameters(), g, strict=True):
        p.data += rho / norm * part
    g_s = evaluate(module, x, y)
    for p, w in zip(module.parameters(), clean, strict=True):
        p.data.copy_(w)
    return g_s


def trained_by(kind: str, bias: bool = True, *, rho: float, interval: int = 1, alpha: float | None = None) -> Tensor:
    """Without alpha: davda54's and pytorch_optimizer's SAM, and with an interval Composer's, at the end of each. With
    alpha: pytorch_optimizer 4.1.0's LookSAM, the paper's but that each tensor has norms of its own."""
    module, kept = network(bias).double(), []
    optimizer = (torch.optim.AdamW(module.parameters(), lr=1e-3) if kind == "AdamW" else
                 torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    for t, (x, y) in enumerate(batches()):
        g = evaluate(module, x, y)
        if alpha is None and (t + 1) % interval == 0:
            at_perturbed(module, g, rho, x, y)
        elif alpha is not None and t % interval == 0:
            g_s = at_perturbed(module, g, rho, x, y)
            kept = [b - (a * b).sum() / (a * a).sum() * a for a, b in zip(g, g_s, strict=True)]
        elif alpha is not None:
            for p, part, v in zip(module.parameters(), g, kept, strict=True):
                p.grad += alpha * part.norm() / v.norm() * v
        optimizer.step()
    return weights_of(module)


# Beside the libraries' and ours ---------------------------------------------------------------------------------------


def by_library(name: str, bias: bool = True, **settings: Any) -> Tensor:
    library, module = pytest.importorskip("pytorch_optimizer"), network(bias).double()
    optimizer = getattr(library, name)(module.parameters(), torch.optim.AdamW, lr=1e-3, **settings)
    for x, y in batches():
        evaluate(module, x, y)
        optimizer.step(lambda x=x, y=y: evaluate(module, x, y))
    return weights_of(module)


def train_ours(config: dict[str, Any], bias: bool = True) -> Tensor:
    import deepspeed

    import ds_looksam  # noqa: F401

    module, longest = network(bias), 0.0
    engine, *_ = deepspeed.initialize(model=module, config=config, model_parameters=module.parameters())
    for x, y in batches():
        engine.backward(cross_entropy(engine(x.float()), y))
        engine.step()
        longest = max(longest, engine.looksam.measurements().get("gradient_norm", 0.0))
    engine.destroy()
    assert longest > 1, "DeepSpeed's default clipping would not show"
    return weights_of(module)


def off(got: Tensor, expected: Tensor) -> float:
    """Relative to how far training has gone."""
    start = weights_of(network(bias=expected.numel() > 60))
    return ((got - expected).norm() / (expected - start).norm()).item()


def ours_off(expected: Tensor, config: dict[str, Any], **params: Any) -> float:
    optimizer = config["optimizer"]
    config = config | {"optimizer": optimizer | {"params": optimizer["params"] | params}}
    return off(run_on_ranks(1, train_ours, config, expected.numel() > 60)[0], expected)


def test_davda54() -> None:
    config, expected = after("davda54/sam"), trained_by("SGD", rho=0.05)
    assert ours_off(expected, config) < TOLERANCE
    del config["gradient_clipping"]  # what the page warns of
    assert ours_off(expected, config) > 0.05


def test_pytorch_optimizers_sam() -> None:
    expected = trained_by("AdamW", rho=0.05)
    assert off(by_library("SAM", rho=0.05), expected) < 1e-9  # float64 against float64; it adds 1e-12 to a norm
    config = after("pytorch_optimizer's LookSAM and SAM")
    assert ours_off(expected, config, k=1, rho=0.05) < TOLERANCE
    assert ours_off(expected, config, k=1, rho=0.05, weight_decay=0.0) > 1e-4  # DeepSpeed's default


@pytest.mark.parametrize("bias", [False, True])
def test_pytorch_optimizers_looksam(bias: bool) -> None:
    """On a model of one tensor, where its norms are the model's, it is ours with its alpha; on two it is not."""
    expected = trained_by("AdamW", bias, rho=0.1, interval=10, alpha=0.7)
    assert off(by_library("LookSAM", bias, rho=0.1, k=10, alpha=0.7), expected) < 1e-6  # it adds 1e-8 to ‖g_v‖
    config = after("pytorch_optimizer's LookSAM and SAM")
    assert (ours_off(expected, config, alpha=0.7) < TOLERANCE) == (not bias)


def test_composers_sam() -> None:
    """With the phase that the page gives for it: the SAM step at the end of each interval."""
    config, expected = after("Composer's SAM"), trained_by("AdamW", rho=0.5, interval=10)
    assert ours_off(expected, config, rho_schedule={"type": "constant", "off_updates": 9}) < TOLERANCE
    assert ours_off(expected, config) > TOLERANCE  # the SAM step comes first
