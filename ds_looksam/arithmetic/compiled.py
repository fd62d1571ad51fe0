"""The arithmetic on shards as ``torch.compile`` fuses it: what the JSON key ``compile`` means on a CPU.

The operations of :mod:`.eager` each go through a core's cache by themselves. Fused, a pass reads every operand once
and writes every result once. Functions of the same names do the same; sums are formed in float64 here, where ``eager``
adds up fp32 sums of chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .eager import Passes, Shard, chunks, perturb_by
from .rounding import round_

CHUNK = 1 << 20
"""Elements per call. A call takes some 20 microseconds; a layer-wise perturbation writes a factor for each."""


def squared_norm(x: Shard, device: torch.device) -> Tensor:
    return _total(_squared, (), device, x)


def reuse_sums(g: Shard, v: Shard, device: torch.device) -> Tensor:
    return torch.stack([_total(_reuse_sums, (3, ), device, [g_i], [v_i]) for g_i, v_i in zip(g, v, strict=True)])


def add_reused_(g: Shard, v: Shard, coefficients: list[Tensor | None]) -> Shard:
    for g_i, v_i, coefficient in zip(g, v, coefficients, strict=True):
        if coefficient is None:
            continue
        factor = coefficient.float()
        for g_c, v_c in _pieces([g_i], [v_i]):
            _compile(_add_reused_)(g_c, v_c, factor)
    return g


def _perturb_piece(weights: Tensor, gradient: Tensor, scale: Tensor, out: Tensor,
                   keys: tuple[int, int] | None) -> Tensor:
    in_place = weights.data_ptr() == out.data_ptr()  # one argument then: a compiler takes two for two memories
    return _compile(_perturb_)(gradient, scale, keys, *((weights, ) if in_place else (weights, out)))


def replay_sums(g: Shard, g_s: Shard, v: Shard | None, device: torch.device) -> Tensor:
    return _total(_replay_sums, (4, ), device, g, g_s, *([] if v is None else [v]))


def project_out_(g: Shard, g_s: Shard, along: Tensor) -> Shard:
    along = along.float()
    for g_c, s_c in _pieces(g, g_s):
        _compile(_project_out_)(g_c, s_c, along)
    return g


def _total(kernel: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device, *shards: Shard) -> Tensor:
    """The sum of ``kernel`` over all pieces, float64 of this shape."""
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    for piece in _pieces(*shards):
        total += _compile(kernel)(*piece).to(device)
    return total


def _pieces(*shards: Shard) -> Iterator[tuple[Tensor, ...]]:
    """The same range of a flat tensor of each shard, until all are through."""
    for flats in zip(*shards, strict=True):
        for lo, hi in chunks(flats[0].numel(), CHUNK):
            yield tuple(flat[lo:hi] for flat in flats)


COMPILED = Passes(squared_norm, reuse_sums, add_reused_, perturb_by(_perturb_piece, CHUNK), replay_sums, project_out_)


@functools.cache
def _compile(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``kernel``, compiled once in a process for all sizes (again for new dtypes, and for one element).

    emulate_precision_casts: without it the compiler drops the rounding to a low precision that is read in fp32 again,
    and the perturbation would seem to have been achieved whatever the model's dtype made of it.
    """
    return torch.no_grad()(torch.compile(kernel, dynamic=True, options={"emulate_precision_casts": True}))


# What is compiled, one piece at a time --------------------------------------------------------------------------------


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dtype=torch.float64)


def _squared(x: Tensor) -> Tensor:
    return _dot(x.float(), x.float())


def _reuse_sums(g: Tensor, v: Tensor) -> Tensor:
    v = v.float()
    return torch.stack([_dot(g, g), _dot(g, v), _dot(v, v)])


def _add_reused_(g: Tensor, v: Tensor, factor: Tensor) -> None:
    g.add_(v.float() * factor)


def _perturb_(g: Tensor, scale: Tensor, keys: tuple[int, int] | None, weights: Tensor,
              out: Tensor | None = None) -> Tensor:
    out = weights if out is None else out
    w, eps = weights.float(), g.float() * scale
    clean = w.to(out.dtype)
    if keys is None:
        perturbed = (w + eps).to(out.dtype)
    else:
        memory = torch.empty_like(w), torch.empty_like(w)
        perturbed = round_(clean.float() + eps, keys, out.dtype, memory).to(out.dtype)
    moved = perturbed.float() - clean.float()
    out.copy_(perturbed)
    return torch.stack([_dot(moved, moved), _dot(moved, eps), _dot(eps, eps)])


def _replay_sums(g: Tensor, g_s: Tensor, v: Tensor | None = None) -> Tensor:
    d = g_s - g
    v = torch.zeros_like(g) if v is None else v.float()
    return torch.stack([_dot(g, d), _dot(d, d), _dot(v, d), _dot(v, g)])


def _project_out_(g: Tensor, g_s: Tensor, along: Tensor) -> None:
    g.copy_(g_s - g - along * g)
