"""The shard arithmetic against the same formulas in float64: one chunk, several, a short last one, none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_looksam import algebra
from ds_looksam.algebra import EAGER, Passes

CPU = torch.device("cpu")
# fp32 dot products of one chunk at a time, of independent normals: each is some 1e-7 of sqrt(‖x‖² ‖y‖²) off.
REL = 1e-6


@pytest.fixture(params=[0, 1, 63, 64, 65, 200], ids=lambda n: f"{n}-elements")
def numel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(algebra, "chunk_size", lambda device: 64)
    return request.param


def shards(numel: int, count: int) -> list[list[Tensor]]:
    """Of two flat tensors each, the second of 70 elements."""
    generator = torch.Generator().manual_seed(numel)
    return [[torch.randn(n, generator=generator) for n in (numel, 70)] for _ in range(count)]


def whole(shard: list[Tensor]) -> Tensor:
    return torch.cat([t.double() for t in shard])


def close(got: Tensor, expected: Tensor, size: Tensor | float = 1.0) -> None:
    assert (got.double() - expected).abs().max().item() <= REL * float(size)


# What algebra's own passes have to be, and what tests/test_compiled.py holds the compiled ones to.


def check_sums(passes: Passes, numel: int, dtype: torch.dtype) -> None:
    g, g_s, v = shards(numel, 3)
    v = [t.to(dtype) for t in v]
    x, d, y = whole(g), whole(g_s) - whole(g), whole(v)
    size = x @ x + d @ d + y @ y

    close(passes.squared_norm(v, CPU), y @ y, size)
    close(passes.replay_sums(g, g_s, v, CPU), torch.stack([x @ d, d @ d, y @ d, y @ x]), size)
    close(passes.replay_sums(g, g_s, None, CPU), torch.stack([x @ d, d @ d, 0 * size, 0 * size]), size)
    for row, g_i, v_i in zip(passes.reuse_sums(g, v, CPU), g, v, strict=True):
        a, b = g_i.double(), v_i.double()
        close(row, torch.stack([a @ a, a @ b, b @ b]), size)


def check_reuse(passes: Passes, numel: int, dtype: torch.dtype) -> None:
    g, v = shards(numel, 2)
    v = [t.to(dtype) for t in v]
    before, memory = [t.clone() for t in g], [t.data_ptr() for t in g]
    u = passes.add_reused_(g, v, [torch.tensor(0.3, dtype=torch.float64), None])
    assert [t.data_ptr() for t in u] == memory
    close(whole(u), whole(before) + 0.3 * whole([v[0], torch.zeros_like(v[1])]))
    assert torch.equal(u[1], before[1])


def check_projection(passes: Passes, numel: int) -> None:
    """g_s - g of a thousandth of g: what would be lost in g_s - (1 + along) g is 1e-4 of it."""
    g, noise = shards(numel, 2)
    g_s = [a + 1e-3 * b for a, b in zip(g, noise, strict=True)]
    x, d = whole(g), whole(g_s) - whole(g)
    along = x @ d / (x @ x)
    g_v = passes.project_out_(g, g_s, along)
    torch.testing.assert_close(whole(g_v), d - along * x, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums(numel: int, dtype: torch.dtype) -> None:
    check_sums(EAGER, numel, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reuse(numel: int, dtype: torch.dtype) -> None:
    check_reuse(EAGER, numel, dtype)


def test_projection_keeps_a_small_difference(numel: int) -> None:
    check_projection(EAGER, numel)


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("master, model, in_place", [
    (torch.float32, torch.float32, False), (torch.float32, torch.float32, True), (torch.float32, torch.bfloat16, False),
    (torch.float32, torch.float16, False), (torch.bfloat16, torch.bfloat16, False),
    (torch.bfloat16, torch.bfloat16, True),
])
def test_perturbation(numel: int, master: torch.dtype, model: torch.dtype, in_place: bool, per_element: bool) -> None:
    (w, _), (g, _) = shards(numel, 2)
    w = w.to(master)
    scale = torch.rand(numel) * 1e-2 if per_element else torch.tensor(1e-2)
    clean, eps = w.to(model).double(), (g * scale).double()
    expected = (w.float() + g * scale).to(model).double()
    out = w if in_place else torch.empty(numel, dtype=model)

    sums = algebra.add_perturbation(w, g, lambda lo, hi: scale[lo:hi] if per_element else scale, out)

    # fp32 may round the product before the sum or not; in low precision the cast decides, bit by bit.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6 if model == torch.float32 else 0)
    if model == torch.float32:
        assert sums.tolist() == [0, 0, 0]
    else:
        moved = out.double() - clean
        close(sums, torch.stack([moved @ moved, moved @ eps, eps @ eps]), moved @ moved + eps @ eps)
