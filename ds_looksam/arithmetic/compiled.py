"""The arithmetic on shards as ``torch.compile`` fuses it: what the JSON key ``compile`` means on a CPU.

The operations of :mod:`.algebra` each go through a core's cache by themselves. Fused, a pass reads every operand once
and writes every result once. Same signatures, same formulas; sums are formed in float64 here, where ``algebra`` adds up
fp32 sums of chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import eager as algebra
from .eager import Passes, Shard
from .rounding import round_, rounding_keys

CHUNK = 1 << 20
"""Elements per call. A call takes some 20 microseconds; a layer-wise perturbation writes a factor for each."""


def squared_norm(x: Shard, device: torch.device) -> Tensor:
    """As :func:`algebra.squared_norm`."""
    return _total(_squared, (), device, x)


def reuse_sums(g: Shard, v: Shard, device: torch.device) -> Tensor:
    """As :func:`algebra.reuse_sums`."""
    return torch.stack([_total(_reuse_sums, (3, ), device, [g_i], [v_i]) for g_i, v_i in zip(g, v, strict=True)])


def add_reused_(g: Shard, v: Shard, coefficients: list[Tensor | None]) -> Shard:
    """As :func:`algebra.add_reused_`."""
    for g_i, v_i, coefficient in zip(g, v, coefficients, strict=True):
        if coefficient is None:
            continue
        factor = coefficient.float()
        for g_c, v_c in _pieces([g_i], [v_i]):
            _compile(_add_reused_)(g_c, v_c, factor)
    return g


def add_perturbation(weights: Tensor, gradient: Tensor, scale_of: Callable[[int, int], Tensor], out: Tensor,
                     rounding: int | None = None) -> Tensor:
    """As :func:`algebra.add_perturbation`, and that itself where ``out`` is fp32: one operation has nothing to fuse."""
    if out.dtype == torch.float32:
        return algebra.add_perturbation(weights, gradient, scale_of, out)
    total = torch.zeros(3, dtype=torch.float64, device=weights.device)
    in_place = weights.data_ptr() == out.data_ptr()  # one argument then: a compiler takes two for two memories
    for lo, hi in _ranges(weights):
        clean_and_out = (weights[lo:hi], ) if in_place else (weights[lo:hi], out[lo:hi])
        keys = None if rounding is None else rounding_keys(rounding, lo)
        total += _compile(_perturb_)(gradient[lo:hi], scale_of(lo, hi), keys, *clean_and_out)
    return total


def replay_sums(g: Shard, g_s: Shard, v: Shard | None, device: torch.device) -> Tensor:
    """As :func:`algebra.replay_sums`."""
    return _total(_replay_sums, (4, ), device, g, g_s, *([] if v is None else [v]))


def project_out_(g: Shard, g_s: Shard, along: Tensor) -> Shard:
    """As :func:`algebra.project_out_`."""
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
        for lo, hi in _ranges(flats[0]):
            yield tuple(flat[lo:hi] for flat in flats)


def _ranges(flat: Tensor) -> Iterator[tuple[int, int]]:
    return algebra.chunks(flat.numel(), CHUNK)


COMPILED = Passes(squared_norm, reuse_sums, add_reused_, add_perturbation, replay_sums, project_out_)


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
