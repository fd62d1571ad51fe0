"""The arithmetic on shards as Triton kernels: what is used on a GPU, unless the JSON says ``"compile": false``.

The operations of :mod:`.eager` each go through the GPU's memory by themselves. Fused, a pass reads every operand once
and writes every result once. Functions of the same names do the same; a sum is formed in fp32 over ``BLOCK`` elements,
in a tree, and in float64 over the blocks.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eager import Passes, Shard, perturb_by

BLOCK = 8192
"""Elements of one program: 32 for each of its threads."""
WARPS = 8


def squared_norm(x: Shard, device: torch.device) -> Tensor:
    return _add_up([_sums(_squared_norm, 1, x_i) for x_i in x], 1, device)[0]


def reuse_sums(g: Shard, v: Shard, device: torch.device) -> Tensor:
    return torch.stack([_sums(_reuse_sums, 3, g_i, v_i).to(device) for g_i, v_i in zip(g, v, strict=True)])


def add_reused_(g: Shard, v: Shard, coefficients: list[Tensor | None]) -> Shard:
    for g_i, v_i, coefficient in zip(g, v, coefficients, strict=True):
        if coefficient is not None:
            _launch(_add_reused, g_i, v_i, coefficient.float())
    return g


def _perturb_piece(weights: Tensor, gradient: Tensor, scale: Tensor, out: Tensor,
                   keys: tuple[int, int] | None) -> Tensor:
    key, other_key = keys or (0, 0)
    return _sums(_perturb, 3, weights, gradient, scale, out, PER_ELEMENT=scale.dim() > 0, STOCHASTIC=keys is not None,
                 key=key, other_key=other_key)


def replay_sums(g: Shard, g_s: Shard, v: Shard | None, device: torch.device) -> Tensor:
    rows = [_sums(_replay_sums, 4, g_i, s_i, g_i if v is None else v[i], WITH_V=v is not None)
            for i, (g_i, s_i) in enumerate(zip(g, g_s, strict=True))]
    return _add_up(rows, 4, device)


def project_out_(g: Shard, g_s: Shard, along: Tensor) -> Shard:
    along = along.float()
    for g_i, s_i in zip(g, g_s, strict=True):
        _launch(_project_out, g_i, s_i, along)
    return g


FUSED = Passes(squared_norm, reuse_sums, add_reused_, perturb_by(_perturb_piece), replay_sums, project_out_)


def _launch(kernel: Any, first: Tensor, *others: Tensor, **constants: int) -> None:
    """``kernel`` over all elements of ``first``, which is what its number of elements is taken from."""
    if first.numel() > 0:
        kernel[(triton.cdiv(first.numel(), BLOCK), )](first, *others, first.numel(), BLOCK=BLOCK, num_warps=WARPS,
                                                      **constants)


def _sums(kernel: Any, columns: int, first: Tensor, *others: Tensor, **constants: int) -> Tensor:
    """The same for a kernel that leaves ``columns`` sums of its block: float64 [columns], of all blocks."""
    blocks = torch.empty(triton.cdiv(first.numel(), BLOCK), columns, dtype=torch.float32, device=first.device)
    _launch(kernel, first, *others, blocks, **constants)
    return blocks.sum(dim=0, dtype=torch.float64)


def _add_up(rows: list[Tensor], columns: int, device: torch.device) -> Tensor:
    if not rows:
        return torch.zeros(columns, dtype=torch.float64, device=device)
    return torch.stack(rows).sum(dim=0).to(device)


# Kernels: pointers to flat tensors, one program for a block of elements -----------------------------------------------


@triton.jit
def _block(numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < numel


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _squared_norm(x_ptr, sums_ptr, numel, BLOCK: tl.constexpr):
    offsets, mask = _block(numel, BLOCK)
    x = _load(x_ptr, offsets, mask)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(x * x))


@triton.jit
def _reuse_sums(g_ptr, v_ptr, sums_ptr, numel, BLOCK: tl.constexpr):
    offsets, mask = _block(numel, BLOCK)
    g, v = _load(g_ptr, offsets, mask), _load(v_ptr, offsets, mask)
    row = sums_ptr + 3 * tl.program_id(0)
    tl.store(row, tl.sum(g * g))
    tl.store(row + 1, tl.sum(g * v))
    tl.store(row + 2, tl.sum(v * v))


@triton.jit
def _add_reused(g_ptr, v_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    offsets, mask = _block(numel, BLOCK)
    g, v = _load(g_ptr, offsets, mask), _load(v_ptr, offsets, mask)
    tl.store(g_ptr + offsets, g + tl.load(factor_ptr) * v, mask=mask)


@triton.jit
def _round(x, offsets, key, other_key, dtype: tl.constexpr):
    """As :func:`rounding.round_`, operation by operation."""
    CUT: tl.constexpr = 13 if dtype == tl.float16 else 16
    bits = (offsets + key).to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15) ^ other_key.to(tl.uint32)) * 0x846CA68B
    bits = bits >> (32 - CUT)
    if dtype == tl.float16:
        shift = tl.where(tl.abs(x) < 6.103515625e-05, 6.103515625e-05, 0.0)
        shift = tl.where(x < 0, -shift, shift)
        largest = 65504.0
    else:
        shift = 0.0
        largest = 3.3895313892515355e38
    cut = ((x + shift).to(tl.uint32, bitcast=True) + bits) >> CUT << CUT
    return tl.where(tl.abs(x) <= largest, cut.to(tl.float32, bitcast=True) - shift, x)


@triton.jit(do_not_specialize=["key", "other_key"])
def _perturb(w_ptr, g_ptr, scale_ptr, out_ptr, sums_ptr, numel, key, other_key, PER_ELEMENT: tl.constexpr,
             STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):
    offsets, mask = _block(numel, BLOCK)
    w, g = _load(w_ptr, offsets, mask), _load(g_ptr, offsets, mask)
    if PER_ELEMENT:
        eps = g * _load(scale_ptr, offsets, mask)
    else:
        eps = g * tl.load(scale_ptr)
    clean = w.to(out_ptr.dtype.element_ty).to(tl.float32)
    if STOCHASTIC:
        perturbed = _round(clean + eps, offsets, key, other_key, out_ptr.dtype.element_ty).to(out_ptr.dtype.element_ty)
    else:
        perturbed = (w + eps).to(out_ptr.dtype.element_ty)
    moved = perturbed.to(tl.float32) - clean
    row = sums_ptr + 3 * tl.program_id(0)
    tl.store(row, tl.sum(moved * moved))
    tl.store(row + 1, tl.sum(moved * eps))
    tl.store(row + 2, tl.sum(eps * eps))
    tl.store(out_ptr + offsets, perturbed, mask=mask)


@triton.jit
def _replay_sums(g_ptr, s_ptr, v_ptr, sums_ptr, numel, WITH_V: tl.constexpr, BLOCK: tl.constexpr):
    offsets, mask = _block(numel, BLOCK)
    g = _load(g_ptr, offsets, mask)
    d = _load(s_ptr, offsets, mask) - g
    row = sums_ptr + 4 * tl.program_id(0)
    tl.store(row, tl.sum(g * d))
    tl.store(row + 1, tl.sum(d * d))
    if WITH_V:
        v = _load(v_ptr, offsets, mask)
        tl.store(row + 2, tl.sum(v * d))
        tl.store(row + 3, tl.sum(v * g))
    else:
        tl.store(row + 2, 0.0)
        tl.store(row + 3, 0.0)


@triton.jit
def _project_out(g_ptr, s_ptr, along_ptr, numel, BLOCK: tl.constexpr):
    offsets, mask = _block(numel, BLOCK)
    g = _load(g_ptr, offsets, mask)
    d = _load(s_ptr, offsets, mask) - g
    tl.store(g_ptr + offsets, d - tl.load(along_ptr) * g, mask=mask)
