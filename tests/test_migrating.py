"""docs/migrating.md: the rule of the other library, and the JSON that the page gives for it, end with the same weights.

The rules are written anew, in float64, with the optimizers of the page's "Before": torch's, with their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .ranks import run_on_ranks
from .test_docs import ROOT, as_object, blocks

BATCH, UPDATES = 128, 23  # three SAM steps at the page's k of 10
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


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs so large that gradients are longer than 1, where DeepSpeed's default clipping binds."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        yield (6 * torch.randn(BATCH, 12, generator=generator, dtype=torch.float64),
               torch.randint(5, (BATCH, ), generator=generator))


def weights_of(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])


# The rules ------------------------------------------------------------------------------------------------------------


def evaluate(module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    module.zero_grad()
    cross_entropy(module(x), y).backward()
    return [p.grad.clone() for p in module.parameters()]


@torch.no_grad()
def climb(module: nn.Module, gradient: list[Tensor], rho: float) -> list[Tensor]:
    """To w + rho g / ‖g‖; the clean weights."""
    clean = [p.clone() for p in module.parameters()]
    norm = torch.stack([g.norm() for g in gradient]).norm()
    for p, g in zip(module.parameters(), gradient, strict=True):
        p += rho / norm * g
    return clean


@torch.no_grad()
def put_back(module: nn.Module, clean: list[Tensor]) -> None:
    for p, w in zip(module.parameters(), clean, strict=True):
        p.copy_(w)


def sam(module: nn.Module, optimizer: torch.optim.Optimizer, rho: float, interval: int = 1) -> None:
    """davda54's and pytorch_optimizer's SAM, and with an interval Composer's: at the end of each."""
    for t, (x, y) in enumerate(batches()):
        gradient = evaluate(module, x, y)
        if (t + 1) % interval == 0:
            clean = climb(module, gradient, rho)
            evaluate(module, x, y)
            put_back(module, clean)
        optimizer.step()


def looksam_by_tensor(module: nn.Module, optimizer: torch.optim.Optimizer, rho: float, k: int, alpha: float) -> None:
    """pytorch_optimizer 4.1.0's LookSAM: as the paper's but that each tensor has norms of its own."""
    kept: list[Tensor] = []
    for t, (x, y) in enumerate(batches()):
        gradient = evaluate(module, x, y)
        if t % k == 0:
            clean = climb(module, gradient, rho)
            second = evaluate(module, x, y)
            put_back(module, clean)
            kept = [g_s - (g * g_s).sum() / (g * g).sum() * g for g, g_s in zip(gradient, second, strict=True)]
        else:
            for p, g, v in zip(module.parameters(), gradient, kept, strict=True):
                p.grad += alpha * g.norm() / v.norm() * v
        optimizer.step()


# Beside ours ----------------------------------------------------------------------------------------------------------


def train_ours(config: dict[str, Any], bias: bool = True) -> tuple[Tensor, float]:
    """The weights, and the longest gradient of a SAM step."""
    import deepspeed

    import ds_looksam  # noqa: F401

    module, longest = network(bias), 0.0
    engine, *_ = deepspeed.initialize(model=module, config=config, model_parameters=module.parameters())
    for x, y in batches():
        engine.backward(cross_entropy(engine(x.float()), y))
        engine.step()
        longest = max(longest, engine.looksam.measurements().get("gradient_norm", 0.0))
    weights = weights_of(module)
    engine.destroy()
    return weights, longest


def trained_by(rule: Callable[..., None], optimizer: Callable[..., torch.optim.Optimizer], bias: bool = True,
               **settings: Any) -> Tensor:
    module = network(bias).double()
    rule(module, optimizer(module.parameters()), **settings)
    return weights_of(module)


def off(got: Tensor, expected: Tensor) -> float:
    """Relative to how far training has gone."""
    start = weights_of(network(bias=expected.numel() > 60))
    return ((got - expected).norm() / (expected - start).norm()).item()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def ours(config: dict[str, Any], bias: bool = True, **params: Any) -> Tensor:
    optimizer = config["optimizer"]
    config = config | {"optimizer": optimizer | {"params": optimizer["params"] | params}}
    [(weights, longest)] = run_on_ranks(1, train_ours, config, bias)
    assert longest > 1, "DeepSpeed's default clipping would not show"
    return weights


def test_davda54() -> None:
    config = after("davda54/sam")
    expected = trained_by(sam, sgd, rho=0.05)
    assert off(ours(config), expected) < TOLERANCE
    del config["gradient_clipping"]  # what the page warns of
    assert off(ours(config), expected) > 0.05


def test_pytorch_optimizers_sam() -> None:
    library = pytest.importorskip("pytorch_optimizer")
    expected, module = trained_by(sam, adamw, rho=0.05), network().double()
    optimizer = library.SAM(module.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-3)
    for x, y in batches():
        evaluate(module, x, y)
        optimizer.step(lambda x=x, y=y: evaluate(module, x, y))
    assert off(weights_of(module), expected) < 1e-9  # float64 against float64; it adds 1e-12 to a norm
    config = after("pytorch_optimizer's LookSAM and SAM")
    assert off(ours(config, k=1, rho=0.05), expected) < TOLERANCE
    assert off(ours(config, k=1, rho=0.05, weight_decay=0.0), expected) > 1e-4  # DeepSpeed's default


def test_pytorch_optimizers_looksam() -> None:
    """On a model of one tensor, where its norms are the model's, it is ours with its alpha; on two it is not."""
    library = pytest.importorskip("pytorch_optimizer")
    config = after("pytorch_optimizer's LookSAM and SAM")
    for bias in (False, True):
        expected, module = trained_by(looksam_by_tensor, adamw, bias, rho=0.1, k=10, alpha=0.7), network(bias).double()
        optimizer = library.LookSAM(module.parameters(), torch.optim.AdamW, rho=0.1, k=10, alpha=0.7, lr=1e-3)
        for x, y in batches():
            evaluate(module, x, y)
            optimizer.step(lambda x=x, y=y, module=module: evaluate(module, x, y))
        assert off(weights_of(module), expected) < 1e-6  # it adds 1e-8 to ‖g_v‖
        assert (off(ours(config, bias, alpha=0.7), expected) < TOLERANCE) == (not bias)


def test_composers_sam() -> None:
    """With the phase that the page gives for it: the SAM step at the end of each interval."""
    config = after("Composer's SAM")
    expected = trained_by(sam, adamw, rho=0.5, interval=10)
    assert off(ours(config, rho_schedule={"type": "constant", "off_updates": 9}), expected) < TOLERANCE
    assert off(ours(config), expected) > TOLERANCE  # the SAM step comes first
