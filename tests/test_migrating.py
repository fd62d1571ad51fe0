"""docs/migrating.md: the rule of the other library, and the JSON that the page gives for it, end with the same weights.

In float64, with the optimizers of the page's "Before": torch's, with their defaults. pytorch_optimizer's rules are run
from it (4.1.0), the others written anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    return [p.grad for p in module.parameters()]


def by_sam(optimizer: Callable[[Any], torch.optim.Optimizer], rho: float, interval: int = 1) -> Tensor:
    """davda54's SAM, and with an interval Composer's: at the end of each."""
    module = network().double()
    base = optimizer(module.parameters())
    for t, (x, y) in enumerate(batches()):
        g = evaluate(module, x, y)
        if (t + 1) % interval == 0:
            clean, norm = copy.deepcopy(module.state_dict()), torch.cat([part.reshape(-1) for part in g]).norm()
            for p, part in zip(module.parameters(), g, strict=True):
                p.data += rho / norm * part
            evaluate(module, x, y)
            module.load_state_dict(clean)
        base.step()
    return weights_of(module)


def by_library(name: str, bias: bool = True, **settings: Any) -> Tensor:
    library, module = pytest.importorskip("pytorch_optimizer"), network(bias).double()
    optimizer = getattr(library, name)(module.parameters(), torch.optim.AdamW, lr=1e-3, **settings)
    for x, y in batches():
        evaluate(module, x, y)
        optimizer.step(lambda x=x, y=y: evaluate(module, x, y))
    return weights_of(module)


# Beside ours ----------------------------------------------------------------------------------------------------------


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


def ours_off(expected: Tensor, config: dict[str, Any], **params: Any) -> float:
    """Relative to how far training has gone."""
    bias, optimizer = expected.numel() > 60, config["optimizer"]
    config = config | {"optimizer": optimizer | {"params": optimizer["params"] | params}}
    [got] = run_on_ranks(1, train_ours, config, bias)
    return ((got - expected).norm() / (expected - weights_of(network(bias))).norm()).item()


def test_davda54() -> None:
    config, expected = after("davda54/sam"), by_sam(lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9), rho=0.05)
    assert ours_off(expected, config) < TOLERANCE
    del config["gradient_clipping"]  # what the page warns of
    assert ours_off(expected, config) > 0.05


def test_pytorch_optimizers_sam() -> None:
    config, expected = after("pytorch_optimizer's LookSAM and SAM"), by_library("SAM", rho=0.05)
    assert ours_off(expected, config, k=1, rho=0.05) < TOLERANCE
    assert ours_off(expected, config, k=1, rho=0.05, weight_decay=0.0) > 1e-4  # DeepSpeed's default


@pytest.mark.parametrize("bias", [False, True])
def test_pytorch_optimizers_looksam(bias: bool) -> None:
    """Its norms are each tensor's. On a model of one tensor it is ours with its alpha; on two it is not."""
    config = after("pytorch_optimizer's LookSAM and SAM")
    expected = by_library("LookSAM", bias, rho=0.1, k=10, alpha=0.7)
    assert (ours_off(expected, config, alpha=0.7) < TOLERANCE) == (not bias)


def test_composers_sam() -> None:
    """With the phase that the page gives for it: the SAM step at the end of each interval."""
    config, expected = after("Composer's SAM"), by_sam(lambda w: torch.optim.AdamW(w, lr=1e-3), rho=0.5, interval=10)
    assert ours_off(expected, config, rho_schedule={"type": "constant", "off_updates": 9}) < TOLERANCE
    assert ours_off(expected, config) > TOLERANCE  # the SAM step comes first
