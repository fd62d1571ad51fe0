"""The mathematics of LookSAM on this rank's shards. No DeepSpeed, no torch.distributed, no host synchronisation.

A *shard* is a list of flat fp32 tensors ([numel_local] each, one per param group or sub-group); the lists g, g_s and v
below have the same lengths and sizes. Only v may be stored in another dtype; it is read in fp32, chunk by chunk.
Scalars are 0-dim float64 tensors on the shards' device. Sums are per rank: the caller adds them up over ranks.

Source: Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022
(arXiv 2203.02714), Algorithm 1. ``beta`` of alpha "auto" is not in the paper.

Everything is written with d = g_s - g instead of g_s: d is of the size of the perturbation's effect, and
<g, g_s> - ‖g‖² or ‖g_s‖² - <g, g_s>²/‖g‖² in fp32 would lose it to cancellation when rho is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import round_, rounding_keys

Shard = list[Tensor]

CHUNK_CPU = 1 << 16
"""Elements per pass and thread on a CPU: 256 KiB of fp32, so that what one pass reads and forms stays in a core's cache
between its operations. It also bounds the error of a dot product in fp32: 1e-7 relative here, 1e-3 over 2^24."""
CHUNK_CPU_MOST = 1 << 20
"""With 16 threads. A quarter of it takes as long to hand out to them as to work on."""
CHUNK_DEVICE = 1 << 24
"""Elements per pass on an accelerator: a launch is cheap against 64 MiB, and the temporaries of a pass stay small."""

BETA_DECAY = 0.8


def chunk_size(device: torch.device) -> int:
    """Elements worth working on in one pass."""
    return min(CHUNK_CPU * torch.get_num_threads(), CHUNK_CPU_MOST) if device.type == "cpu" else CHUNK_DEVICE


def chunks(numel: int, step: int) -> Iterator[tuple[int, int]]:
    """[lo, hi) ranges of ``step`` elements that cover ``numel``, the last one shorter."""
    for lo in range(0, numel, step):
        yield lo, min(lo + step, numel)


def in_chunks(*flats: Tensor, temporaries: int) -> Iterator[list[Tensor]]:
    """One pass: chunk by chunk the same range of every flat tensor, followed by so many fp32 tensors of its size.

    The temporaries are the same memory for every chunk. Fresh memory would come from the operating system page by page,
    which on a CPU takes several times as long as the arithmetic.
    """
    step = chunk_size(flats[0].device)
    memory = torch.empty(temporaries, min(step, flats[0].numel()), dtype=torch.float32, device=flats[0].device)
    rows = memory.unbind()
    for views in zip(*(flat.split(step) for flat in flats), strict=True):
        if views[0].numel() < memory.size(1):  # the last chunk
            rows = memory[:, :views[0].numel()].unbind()
        yield [*views, *rows]


def as_fp32(x: Tensor, memory: Tensor) -> Tensor:
    """``x`` where it is fp32, else a copy in ``memory``."""
    return x if x.dtype == torch.float32 else memory.copy_(x)


def read_flags(flags: list[Tensor]) -> list[bool]:
    """Bools, 0-dim, on any devices. Waits for the device once, not for each."""
    return torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []


def are_same(norms: Tensor, others: Tensor) -> Tensor:
    """Bool, elementwise; a nan is the same as another."""
    return torch.isclose(norms, others, rtol=0, atol=0, equal_nan=True)


def squared_norm(x: Shard, device: torch.device) -> Tensor:
    """‖x‖² of this rank's part, float64 0-dim. An empty shard gives 0."""
    parts = []
    for x_i in x:
        for x_c, memory in in_chunks(x_i, temporaries=1):
            x_c = as_fp32(x_c, memory)
            parts.append(torch.dot(x_c, x_c))
    return add_up(parts, device)


def replay_sums(g: Shard, g_s: Shard, v: Shard | None, device: torch.device) -> Tensor:
    """The four sums a SAM step needs after the second evaluation, in one pass over g, g_s and v.

    Returns:
        float64 [4]: <g, d>, ‖d‖², <v, d>, <v, g> with d = g_s - g; the last two are 0 while there is no v.
    """
    columns: tuple[list[Tensor], ...] = ([], [], [], [])
    for i, (g_i, s_i) in enumerate(zip(g, g_s, strict=True)):
        for g_c, s_c, *v_c, d_c, memory in in_chunks(g_i, s_i, *([] if v is None else [v[i]]), temporaries=2):
            torch.sub(s_c, g_c, out=d_c)
            columns[0].append(torch.dot(g_c, d_c))
            columns[1].append(torch.dot(d_c, d_c))
            for x in v_c:
                x = as_fp32(x, memory)
                columns[2].append(torch.dot(x, d_c))
                columns[3].append(torch.dot(x, g_c))
    return torch.stack([add_up(parts, device) for parts in columns])


def project_out_(g: Shard, g_s: Shard, along: Tensor) -> Shard:
    """g_v = d - (<g, d> / ‖g‖²) g, written over g. ``along`` is <g, d> / ‖g‖².

    Equal to Algorithm 1's g_s - (<g, g_s> / ‖g‖²) g, because g's own part cancels.
    """
    minus_along = -along.float()
    for g_i, s_i in zip(g, g_s, strict=True):
        for g_c, s_c, d_c in in_chunks(g_i, s_i, temporaries=1):
            torch.addcmul(torch.sub(s_c, g_c, out=d_c), g_c, minus_along, out=g_c)
    return g


def reuse_sums(g: Shard, v: Shard, device: torch.device) -> Tensor:
    """For each flat tensor of this rank ‖g‖², <g, v> and ‖v‖²: float64 [len(g), 3], in one pass over g and v."""
    rows = []
    for g_i, v_i in zip(g, v, strict=True):
        columns: tuple[list[Tensor], ...] = ([], [], [])
        for g_c, v_c, memory in in_chunks(g_i, v_i, temporaries=1):
            v_c = as_fp32(v_c, memory)
            for column, (a, b) in zip(columns, ((g_c, g_c), (g_c, v_c), (v_c, v_c)), strict=True):
                column.append(torch.dot(a, b))
        rows.append(torch.stack([add_up(parts, device) for parts in columns]))
    return torch.stack(rows)


def reused_squared_norm(sums: Tensor, coefficients: list[Tensor | None]) -> Tensor:
    """‖u‖² of u = g + coefficient v, float64 0-dim, from :func:`reuse_sums` summed over ranks."""
    c = torch.stack([sums.new_zeros(()) if c is None else c for c in coefficients])
    g_squared, g_dot_v, v_squared = sums.unbind(dim=1)
    return torch.clamp(g_squared + 2 * c * g_dot_v + c**2 * v_squared, min=0).sum()


def add_reused_(g: Shard, v: Shard, coefficients: list[Tensor | None]) -> Shard:
    """u = g + coefficient v, written over g; one coefficient per flat tensor, None leaves it alone."""
    for g_i, v_i, coefficient in zip(g, v, coefficients, strict=True):
        if coefficient is None:
            continue
        factor = coefficient.float()
        if v_i.dtype == g_i.dtype:
            g_i.addcmul_(v_i, factor)
        else:
            for g_c, v_c, memory in in_chunks(g_i, v_i, temporaries=1):
                g_c.addcmul_(as_fp32(v_c, memory), factor)
    return g


def perturbation_scale(rho: float, g_squared: Tensor) -> Tensor:
    """rho / ‖g‖, fp32 0-dim: eps = rho g / ‖g‖. 0 where ‖g‖ is 0, not finite or too small to divide by."""
    return torch.nan_to_num((rho * g_squared.rsqrt()).float(), 0.0, 0.0, 0.0)


def add_perturbation(weights: Tensor, gradient: Tensor, scale_of: Callable[[int, int], Tensor], out: Tensor,
                     rounding: int | None = None) -> Tensor:
    """out = weights + eps with eps = scale * gradient, formed in fp32 and cast once into out's dtype.

    Args:
        weights: the clean weights, [numel_local]: the master's, or where there is none the model's own. ``out`` may be
            the same tensor.
        gradient: [numel_local]; read in fp32.
        scale_of: (lo, hi) -> factor of gradient[lo:hi], fp32, 0-dim or [hi - lo].
        out: where the model's weights lie, in its dtype.
        rounding: None rounds to nearest. A seed rounds stochastically (rounding.py), another one for every update, rank
            and tensor. Then out = cast(weights) + eps on average: eps is added to what the model computed the gradient
            with. To the master it would come with the rounding of the master, which is no noise where a run starts from
            low-precision weights: it is what the updates since have added up to, and that points against the gradient.

    Returns:
        float64 [3]: ‖Δw‖², <Δw, eps> and ‖eps‖² with Δw = out - cast(weights), this rank's part. A low-precision weight
        moves only where eps, or chance, takes it past a rounding boundary, and then by a whole step. Zeros where
        ``out`` is fp32: the weights move by eps then, and the sums would take longer than moving them.
    """
    if out.dtype == torch.float32:
        lo = 0
        for w_c, g_c, out_c, memory in in_chunks(weights, gradient, out, temporaries=1):
            torch.addcmul(as_fp32(w_c, memory), g_c, scale_of(lo, lo + g_c.numel()), out=out_c)
            lo += g_c.numel()
        return torch.zeros(3, dtype=torch.float64, device=weights.device)
    columns: tuple[list[Tensor], ...] = ([], [], [])
    lo = 0
    for w_c, g_c, out_c, eps, clean, moved, memory, *more in in_chunks(weights, gradient, out,
                                                                       temporaries=4 if rounding is None else 5):
        w = as_fp32(w_c, memory)
        torch.mul(as_fp32(g_c, eps), scale_of(lo, lo + g_c.numel()), out=eps)
        if rounding is None:
            torch.add(w, eps, out=moved)
        clean.copy_(out_c.copy_(w))  # as the model had it
        if rounding is not None:
            round_(torch.add(clean, eps, out=moved), rounding_keys(rounding, lo), out.dtype, (memory, more[0]))
        moved.copy_(out_c.copy_(moved)).sub_(clean)
        for column, (a, b) in zip(columns, ((moved, moved), (moved, eps), (eps, eps)), strict=True):
            column.append(torch.dot(a, b))
        lo += g_c.numel()
    return torch.stack([add_up(parts, weights.device) for parts in columns])


def perturb_by(piece: Callable[..., Tensor], step: int | None = None) -> Callable[..., Tensor]:
    """:func:`add_perturbation` by a fused ``piece``, which is given ``step`` elements at a time: their clean weights,
    gradient, scale, out, and keys of the rounding (None: to nearest). Where ``out`` is fp32 there is nothing to fuse.
    """
    def perturb(weights: Tensor, gradient: Tensor, scale_of: Callable[[int, int], Tensor], out: Tensor,
                rounding: int | None = None) -> Tensor:
        if out.dtype == torch.float32:
            return add_perturbation(weights, gradient, scale_of, out)
        total = torch.zeros(3, dtype=torch.float64, device=weights.device)
        for lo, hi in chunks(weights.numel(), step or chunk_size(weights.device)):
            keys = None if rounding is None else rounding_keys(rounding, lo)
            total += piece(weights[lo:hi], gradient[lo:hi], scale_of(lo, hi), out[lo:hi], keys)
        return total

    return perturb


@dataclass(frozen=True)
class Passes:
    """Everything that goes through whole shards: this module's functions of these names, or others that do the same."""

    squared_norm: Callable[[Shard, torch.device], Tensor]
    reuse_sums: Callable[[Shard, Shard, torch.device], Tensor]
    add_reused_: Callable[[Shard, Shard, list[Tensor | None]], Shard]
    add_perturbation: Callable[..., Tensor]
    replay_sums: Callable[[Shard, Shard, Shard | None, torch.device], Tensor]
    project_out_: Callable[[Shard, Shard, Tensor], Shard]


EAGER = Passes(squared_norm, reuse_sums, add_reused_, add_perturbation, replay_sums, project_out_)


def reuse_strength(alpha: float | None, beta: Tensor, g_squared: Tensor, v_squared: Tensor) -> Tensor:
    """The factor of v in u = g + factor v, float64 0-dim.

    alpha ‖g‖ / ‖v‖ (Algorithm 1), with max(beta, 0) in alpha's place for alpha "auto" (None).
    0 where ‖v‖ is 0 or anything is not finite.
    """
    strength = torch.clamp(beta, min=0) if alpha is None else alpha
    factor = strength * (g_squared / v_squared).sqrt()
    usable = torch.isfinite(factor.float()) & (v_squared > 0)
    return torch.where(usable, factor, torch.zeros_like(factor))


@dataclass(frozen=True)
class ReplayScalars:
    """What a SAM step knows of the whole model after its two evaluations. Every field is a float64 0-dim tensor.

    ``along``: <g, d> / ‖g‖² (0 where g is 0). ``g_s_squared``: ‖g_s‖². ``g_v_squared``: ‖g_v‖².
    ``g_dot_g_s``: <g, g_s>. ``v_dot_g_v``: <v, g_v> with the v that was stored before this step.
    ``moved_ratio``: ‖Δw‖ / ‖eps‖ and ``moved_cosine``: cos(Δw, eps), where Δw is by how much the rounded weights moved
    (1 where eps is 0).
    """

    along: Tensor
    g_s_squared: Tensor
    g_v_squared: Tensor
    g_dot_g_s: Tensor
    v_dot_g_v: Tensor
    moved_ratio: Tensor
    moved_cosine: Tensor

    @classmethod
    def from_sums(cls, g_squared: Tensor, sums: Tensor, moved: Tensor) -> ReplayScalars:
        """From ‖g‖², :func:`replay_sums` and what :func:`add_perturbation` returned, all summed over ranks."""
        g_dot_d, d_squared, v_dot_d, v_dot_g = sums.unbind()
        moved_squared, moved_dot_eps, eps_squared = moved.unbind()
        one = torch.ones_like(eps_squared)
        along = torch.where(g_squared > 0, g_dot_d / g_squared, torch.zeros_like(g_dot_d))
        return cls(
            along=along,
            g_s_squared=g_squared + 2 * g_dot_d + d_squared,
            g_v_squared=torch.clamp(d_squared - along * g_dot_d, min=0),
            g_dot_g_s=g_squared + g_dot_d,
            v_dot_g_v=v_dot_d - along * v_dot_g,
            moved_ratio=torch.where(eps_squared > 0, (moved_squared / eps_squared).sqrt(), one),
            moved_cosine=torch.where(moved_squared * eps_squared > 0,
                                     moved_dot_eps / (moved_squared * eps_squared).sqrt(),
                                     torch.where(eps_squared > 0, torch.zeros_like(one), one)),
        )


def cosine(x_dot_y: Tensor, x_squared: Tensor, y_squared: Tensor) -> Tensor:
    """<x, y> / (‖x‖ ‖y‖), float64 0-dim. 0 where that is not defined."""
    return torch.nan_to_num(x_dot_y / (x_squared.sqrt() * y_squared.sqrt()), 0.0, 0.0, 0.0)


def update_beta(beta: Tensor | None, v_dot_g_v: Tensor, v_squared: Tensor, g_squared: Tensor) -> Tensor:
    """beta <- 0.8 beta + 0.2 b with b = <v, g_v> / (‖v‖ ‖g‖), float64 0-dim; b itself where beta is None.

    b says how much of the fresh g_v the stored v would have given, in units of ‖g‖. Where it is not defined
    (‖v‖ or ‖g‖ is 0) it counts as 0.
    """
    b = cosine(v_dot_g_v, v_squared, g_squared)  # the same quotient, though of g_v with v in units of ‖g‖
    return b if beta is None else BETA_DECAY * beta + (1 - BETA_DECAY) * b


def add_up(parts: list[Tensor], device: torch.device) -> Tensor:
    """Sum of 0-dim fp32 partial sums, in float64 so that many chunks lose nothing."""
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(parts).sum(dtype=torch.float64).to(device)
