"""The shard arithmetic against the same formulas in float64: one chunk, several, a short last one, none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_looksam.arithmetic import eager as algebra
from ds_looksam.arithmetic import layout
from ds_looksam.arithmetic.eager import EAGER, Passes, perturbation_scale
from ds_looksam.arithmetic.layerwise import perturbation_scales
from ds_looksam.arithmetic.layout import LayerMap, Segment
from ds_looksam.arithmetic.rounding import random_bits_, round_, rounding_keys, rounding_seed

from .training import DTYPES

CPU = torch.device("cpu")
SEED = 5
# fp32 dot products of one chunk at a time, of independent normals: each is some 1e-7 of sqrt(‖x‖² ‖y‖²) off.
REL = 1e-6
NUMEL = [0, 1, 200, 8192, 20_000]
"""For triton_passes.py, elements: none, one, a part of a block, a block, several and a part."""


def shards(numel: int, count: int, device: torch.device) -> list[list[Tensor]]:
    """Of two flat tensors each, the second of 70 elements."""
    generator = torch.Generator().manual_seed(numel)
    return [[torch.randn(n, generator=generator).to(device) for n in (numel, 70)] for _ in range(count)]


def whole(shard: list[Tensor]) -> Tensor:
    return torch.cat([t.double().cpu() for t in shard])


def close(got: Tensor, expected: Tensor, size: Tensor | float = 1.0) -> None:
    assert (got.double().cpu() - expected).abs().max().item() <= REL * float(size)


def check_nothing(passes: Passes, numel: int = 0, device: torch.device = CPU) -> None:
    """A rank that owns nothing."""
    assert passes.replay_sums([], [], None, device).tolist() == [0, 0, 0, 0]
    assert passes.squared_norm([], device).item() == 0
    assert passes.squared_norm([torch.empty(0, device=device)], device).item() == 0


def check_sums_and_reuse(passes: Passes, numel: int, device: torch.device = CPU, *, dtype: torch.dtype) -> None:
    """``dtype``: that of v."""
    g, g_s, v = shards(numel, 3, device)
    v = [t.to(dtype) for t in v]
    x, d, y = whole(g), whole(g_s) - whole(g), whole(v)
    size = x @ x + d @ d + y @ y

    close(passes.squared_norm(v, device), y @ y, size)
    close(passes.replay_sums(g, g_s, v, device), torch.stack([x @ d, d @ d, y @ d, y @ x]), size)
    close(passes.replay_sums(g, g_s, None, device), torch.stack([x @ d, d @ d, 0 * size, 0 * size]), size)
    for row, g_i, v_i in zip(passes.reuse_sums(g, v, device), g, v, strict=True):
        a, b = whole([g_i]), whole([v_i])
        close(row, torch.stack([a @ a, a @ b, b @ b]), size)

    before, memory = [t.clone() for t in g], [t.data_ptr() for t in g]
    u = passes.add_reused_(g, v, [torch.tensor(0.3, dtype=torch.float64, device=device), None])
    assert [t.data_ptr() for t in u] == memory
    close(whole(u), whole(before) + 0.3 * whole([v[0], torch.zeros_like(v[1])]))
    assert torch.equal(u[1], before[1])


def check_projection(passes: Passes, numel: int, device: torch.device = CPU) -> None:
    """g_s - g of a thousandth of g: what would be lost in g_s - (1 + along) g is 1e-4 of it."""
    g, noise = shards(numel, 2, device)
    g_s = [a + 1e-3 * b for a, b in zip(g, noise, strict=True)]
    x, d = whole(g), whole(g_s) - whole(g)
    along = x @ d / (x @ x)
    g_v = passes.project_out_(g, g_s, along.to(device))
    torch.testing.assert_close(whole(g_v), d - along * x, rtol=1e-5, atol=1e-9)


def check_perturbation(passes: Passes, numel: int, device: torch.device = CPU, *, master: torch.dtype,
                       model: torch.dtype, in_place: bool, per_element: bool, rounding: int | None) -> None:
    """That it is measured as it was rounded: a compiler that takes x.to(bfloat16).float() for x says that the weights
    moved by eps. ``rounding``: a seed, for bits as the eager arithmetic gives them on the whole tensor."""
    (w, _), (g, _) = shards(numel, 2, device)
    w = w.to(master)
    g = g if rounding is None else g.to(master)
    scale = (torch.rand(numel) * 1e-2 if per_element else torch.tensor(1e-2)).to(device)
    clean, eps = whole([w.to(model)]), whole([g.float() * scale])
    expected = whole([(w.float() + g * scale).to(model)])
    if rounding is not None:
        expected = at_random(w.to(model).float() + g.float() * scale, model, rounding).double().cpu()
    out = w if in_place else torch.empty(numel, dtype=model, device=device)

    sums = passes.add_perturbation(w, g, lambda lo, hi: scale[lo:hi] if per_element else scale, out, rounding)

    # fp32 may round the product before the sum or not; in low precision the cast decides, bit by bit, but that a GPU
    # that fuses w + scale g rounds a thousandth of the elements to the other side.
    off = (whole([out]) - expected).abs()
    if model == torch.float32:
        assert (off <= 1e-6).all()
        assert sums.tolist() == [0, 0, 0]
        return
    assert (off > 0).sum() <= (0 if device == CPU else 1e-3 * numel)
    assert (off <= 2 * torch.finfo(model).eps * expected.abs()).all()
    moved = whole([out]) - clean
    assert (moved - eps).norm() >= 1e-3 * eps.norm(), "rounding was meant to show"
    close(sums, torch.stack([moved @ moved, moved @ eps, eps @ eps]), moved @ moved + eps @ eps)


def at_random(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    return round_(x.clone(), rounding_keys(seed, 0), dtype, (torch.empty_like(x), torch.empty_like(x)))


PERTURBATIONS = {
    "-".join([master, model, where, "each" if each else "one", "random" if seed else "nearest"]): partial(
        check_perturbation, master=DTYPES[master], model=DTYPES[model], in_place=where == "in place", per_element=each,
        rounding=seed)
    for (master, model, where), each, seed in product(
        [("fp32", "fp32", "out"), ("fp32", "fp32", "in place"), ("fp32", "bf16", "out"), ("fp32", "fp16", "out"),
         ("bf16", "bf16", "out"), ("bf16", "bf16", "in place"), ("fp16", "fp16", "in place")],
        [False, True], [None, SEED])
    if model != "fp32" or seed is None
}
CHECKS: dict[str, Callable[..., None]] = {
    "nothing": check_nothing, "projection": check_projection,
    "sums and reuse, fp32": partial(check_sums_and_reuse, dtype=torch.float32),
    "sums and reuse, bf16": partial(check_sums_and_reuse, dtype=torch.bfloat16), **PERTURBATIONS,
}
"""What algebra's own passes have to be, and what the tests of compiled.py and triton_passes.py hold theirs to: each is
called with the passes, how many elements, and the device."""


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("check", CHECKS)
def test_passes(monkeypatch: pytest.MonkeyPatch, check: str, numel: int) -> None:
    monkeypatch.setattr(algebra, "chunk_size", lambda device: 64)
    CHECKS[check](EAGER, numel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    """Between two numbers, at the ends of an exponent's range, below the smallest exponent, of both signs."""
    tiny, step = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    x = torch.tensor([0.3, 1.0, 1 + 0.1 * step, 1 - 0.1 * step, 2 - 0.7 * step, 0.02, tiny * (1 + 0.5 * step), 37.7,
                      tiny * (1 - 0.2 * step), tiny * 0.37, tiny * step * 0.3, tiny * step * 1.3])
    x = torch.cat([x, -x])
    seeds = 2000
    drawn = torch.stack([at_random(x, dtype, rounding_seed(SEED, seed)) for seed in range(seeds)])
    assert torch.equal(drawn.to(dtype).float(), drawn)
    gap = step * torch.maximum(2.0 ** x.abs().double().log2().floor(), torch.tensor(tiny).double())
    assert ((drawn.double() - x.double()).abs() < gap).all(), "neighbours"
    share = (x.abs().double() / gap) % 1  # of the way from one to the other
    standard_error = gap * (share * (1 - share) / seeds).sqrt()
    assert ((drawn.double().mean(0) - x.double()).abs() <= 4 * standard_error).all()
    assert ((drawn != x).any(0) == (share > 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_leaves_what_is_beyond(dtype: torch.dtype) -> None:
    largest, nans = torch.finfo(dtype).max, torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    x = torch.tensor([torch.inf, -torch.inf, largest, -largest])
    if dtype == torch.float16:
        x = torch.cat([x, torch.tensor([65519.0, -65519.0, 65520.0, 1e9])])
    for seed in range(100):
        assert torch.equal(at_random(x, dtype, seed).to(dtype), x.to(dtype))
        assert at_random(nans.view(torch.float32), dtype, seed).isnan().all()


def layer_map(sizes: list[int], before: int, after: int, device: torch.device) -> LayerMap:
    """Of one flat tensor: padding, parameters of these sizes, padding."""
    parameters = [nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    starts = accumulate(sizes[:-1], initial=before)
    segments = [Segment(p, start, 0, p.numel()) for p, start in zip(parameters, starts, strict=True)]
    return LayerMap([segments], [before + sum(sizes) + after], [parameters], device)


@pytest.mark.parametrize("rule", [None, "norm", "relative", "gradient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_perturbed_alone(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rule: Any) -> None:
    """A rank with the whole model in low precision, its weights and gradients flat, perturbs it by its own gradient."""
    monkeypatch.setattr(algebra, "chunk_size", lambda device: 64)
    monkeypatch.setattr(layout, "chunk_size", lambda device: 64)
    sizes, padding = [130, 7, 64, 1], 8
    layers = layer_map(sizes, 0, padding, CPU)
    generator = torch.Generator().manual_seed(0)
    w, g = (torch.randn(sum(sizes), generator=generator).to(dtype) for _ in range(2))
    w, g = (nn.functional.pad(x, (0, padding)) for x in (w, g))
    g_squared, w_squared = layers.squares([g]), layers.squares([w])
    ends = list(pairwise(accumulate(sizes, initial=0)))
    for squares, flat in ((g_squared, g), (w_squared, w)):
        close(squares, torch.stack([flat[a:b].double().square().sum() for a, b in ends]), 400)
    close(EAGER.squared_norm([g], CPU), g_squared.sum(), 400)
    if rule is None:
        scales = perturbation_scale(0.05, EAGER.squared_norm([g], CPU)).expand(5)
    else:
        rho = torch.full((4, ), 0.05, dtype=torch.float64)
        scales = perturbation_scales(w_squared, g_squared, torch.ones(4, dtype=torch.bool), rho, rule, loss_scale=8.0)
    eps = g.float() * torch.cat([scale.expand(n) for scale, n in zip(scales, [*sizes, padding], strict=True)])
    expected, clean = at_random(w.float() + eps, dtype, SEED).to(dtype), w.clone()

    moved = EAGER.add_perturbation(w, g, lambda lo, hi: layers.expand(scales, 0, lo, hi), w, SEED)

    assert torch.equal(w, expected)
    change, eps = w.double() - clean.double(), eps.double()
    close(moved, torch.stack([change @ change, change @ eps, eps @ eps]), change @ change + eps @ eps)


def test_rounding_where_the_default_device_is_another_one() -> None:
    """``torch.set_default_device("cuda")`` with shards in host memory; there is no GPU here."""
    keys, (x, memory) = rounding_keys(3, 5), torch.empty(2, 64, dtype=torch.int32)
    expected = random_bits_(x, keys, 16, memory).clone()
    with torch.device("meta"):
        assert torch.equal(random_bits_(x, keys, 16, memory), expected)
