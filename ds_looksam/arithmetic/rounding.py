"""Stochastic rounding of fp32 to bf16 or fp16: up or down at random, so that the mean is the number itself.

Nearest rounding leaves a weight where it is unless eps takes it past a rounding boundary. From weights that lie on the
grid already (a rank's own low-precision copy; a run that starts from bf16 weights, for as long as its learning rate is
small) that is never, for a small eps. Rounded at random, the weight moves by a whole step with the probability that
makes it eps on average (Gupta et al. 2015, arXiv 1502.02551).

Random numbers are a hash of a seed and of the element's index: there is no generator whose state a checkpoint would
have to hold, and neither the number of threads nor the size of a chunk nor the device changes them. The operations of
:func:`random_bits_` and :func:`round_` are written once more in ``triton_passes.py``, for the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

M1, M2 = 0x7FEB352D, 0x846CA68B - 2**32
"""Multipliers of a 32-bit finalizer whose output bits depend on all input bits nearly evenly ("lowbias32", found by
Wellons' hash-prospector), as int32 holds them."""

CUT = {torch.bfloat16: 16, torch.float16: 13}
"""How many of fp32's 23 mantissa bits each dtype lacks."""


def rounding_seed(*numbers: int) -> int:
    """A seed below 2^64 for what these numbers name, say (seed, update, rank, flat tensor): others for other numbers.
    """
    seed = 0
    for number in numbers:
        seed = _mix(seed + number + 0x9E3779B97F4A7C15)
    return seed


def seed_for(dtype: torch.dtype, rounding: int | None, *numbers: int) -> int | None:
    """A seed of its own for a tensor that is rounded to ``dtype``; None where that is not rounded at random."""
    return None if rounding is None or dtype not in CUT else rounding_seed(rounding, *numbers)


def rounding_keys(seed: int, first: int) -> tuple[int, int]:
    """What :func:`random_bits_` takes for the elements from index ``first`` on: two numbers that int32 holds."""
    mixed = _mix(seed)
    return _as_int32(mixed + first), _as_int32(mixed >> 32)


def _mix(x: int) -> int:
    """The finalizer of SplitMix64 (Steele et al. 2014)."""
    x &= 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _as_int32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def random_bits_(x: Tensor, keys: tuple[int, int], count: int, memory: Tensor) -> Tensor:
    """int32 [numel]: ``count`` random bits for each element, 1 to 16, written over x. ``memory``: as x.

    torch shifts the sign in from the left, which is masked out again: the hash is of unsigned numbers.
    """
    torch.arange(x.numel(), device=x.device, out=x).add_(keys[0])
    x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=memory).bitwise_and_(0xFFFF)).mul_(M1)
    x.bitwise_xor_(torch.bitwise_right_shift(x, 15, out=memory).bitwise_and_(0x1FFFF)).bitwise_xor_(keys[1]).mul_(M2)
    return x.bitwise_right_shift_(32 - count).bitwise_and_((1 << count) - 1)


def round_(x: Tensor, keys: tuple[int, int], dtype: torch.dtype, memory: tuple[Tensor, Tensor]) -> Tensor:
    """Each element becomes one of its two neighbours in ``dtype``, with x as the mean: a cast changes nothing more.

    inf and nan stay, and so does what is beyond the largest number of fp16: the cast decides.

    Args:
        x: fp32 [numel].
        dtype: bf16 or fp16.
        memory: two tensors as x.
    """
    a, y = memory
    cut, limits = CUT[dtype], torch.finfo(dtype)
    bits = random_bits_(a.view(torch.int32), keys, cut, y.view(torch.int32))
    y.copy_(x)
    if dtype == torch.float16:
        # Numbers too small for an exponent of their own are as far apart as the first ones that have one: added to
        # these, they are cut where these are. (bf16 has the exponents of fp32.)
        shift = torch.copysign((x.abs() < limits.tiny) * limits.tiny, x)
        y.add_(shift)
    # A sum of integers, carried into the exponent where the mantissa is full: right there too, as the next number is
    # the first one of the next exponent. The sign is apart from it, so negative numbers need nothing else.
    y.view(torch.int32).add_(bits).bitwise_and_(-1 << cut)
    if dtype == torch.float16:
        return torch.where(x.abs() <= limits.max, y.sub_(shift), x, out=x)
    # The carry may have made a nan a number: -inf, or nan where x is, costs a sixth of what comparing does.
    return torch.maximum(y, torch.clamp(x, max=-math.inf, out=a), out=x)
