"""Optimizers with one trust ratio per parameter tensor, on ZeRO's flat shards.

A ZeRO wrapper hands its base optimizer flat tensors, one per param group (stages 1 and 2, BF16_Optimizer) or per
sub-group (stage 3), in which layers begin and end anywhere, and calls ``step()`` for one flat tensor after the other. A
trust ratio needs the norms of whole layers, over all ranks. So an update has two phases:

    step() for each flat tensor:   gather(): moments, and this rank's part of the layers' norms
                                   -> [L, 2] float64, added up over the flat tensors
    ... the last of them:          ONE all-reduce of [L, 2]; then apply() for every flat tensor, and the earlier
                                   ones' new weights are cast again for the model

L is the number of parameter tensors of the whole model, whoever owns them. Without ZeRO each parameter is a flat tensor
of its own, there is nothing to send, and the phases are the same.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..arithmetic.eager import chunk_size, chunks
from ..arithmetic.layout import LayerMap, Range, Segment
from ..ranks.reduce import sum_over_ranks
from ..shards.base import GradientShards

Group = dict[str, Any]
Parts = list[Tensor]
BELOW = {"lr": math.inf, "weight_decay": math.inf, "trust_coefficient": math.inf, "momentum": 1, "betas[0]": 1,
         "betas[1]": 1}
"""What hyper-parameters, from 0 on, have to be below."""


class LayerwiseOptimizer(torch.optim.Optimizer):
    """A torch optimizer with trust ratios. Used through DeepSpeed: a JSON type, or LookSAM's ``base_optimizer``.

    It can also be used as any torch optimizer, without ZeRO; every parameter is then one layer.

    Subclasses say in ``STATE`` which tensors of a parameter's size they keep, and implement the two phases.

    A param group with ``"trust_ratio": False`` keeps trust ratio 1, as biases and norms do in most recipes.
    """

    STATE: tuple[str, ...]

    def __init__(self, params: Any, **defaults: Any) -> None:
        values = defaults | {f"betas[{i}]": beta for i, beta in enumerate(defaults.get("betas", ()))}
        for name, end in BELOW.items():
            if name in values and not 0 <= values[name] < end:
                raise ValueError(f"{name}: {values[name]!r} is not in [0, {end})")
        super().__init__(params, defaults)
        self._stand_alone()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """torch copies and unpickles the state and the param groups; a copy is bound to nothing. load_state_dict() ends
        here too, and must not undo the binding."""
        super().__setstate__(state)
        if not hasattr(self, "_gathered"):
            self._stand_alone()

    def _stand_alone(self) -> None:
        self._gathered: list[Flat] = []
        self._norms: Tensor | None = None
        self._own = {id(p) for group in self.param_groups for p in group["params"]}
        self._waiting_for_wrapper = False
        self._layers: LayerMap | None = None
        self._layers_of: list[int] = []
        self._shards: GradientShards | None = None

    # Set-up, by the engine ------------------------------------------------------------------------------------------

    def wait_for_wrapper(self) -> None:
        """A DeepSpeed wrapper will take the parameters over. Until :meth:`bind`, step() only creates the state.

        FP16_UnfusedOptimizer calls it once with gradients of 0 while it is being built; that is no update.
        """
        self._waiting_for_wrapper = True

    def bind(self, shards: GradientShards) -> None:
        """The parameters now are what the wrapper made of them. ``shards``: its room. Where that has no process group,
        every rank holds whole parameters."""
        self._waiting_for_wrapper = False
        self._own = {id(p) for group in self.param_groups for p in group["params"]}
        if shards.process_group is not None:
            self._layers, self._shards = shards.layers, shards

    def begin_update(self) -> None:
        """Forget what has been gathered: at the end of an update, or of one that was interrupted by an exception."""
        self._gathered, self._norms = [], None

    # The update -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Gather for the parameters that are there; with the last of them, reduce and apply. Collective under ZeRO."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        here = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in here:
            self._initialize(p)
        if self._waiting_for_wrapper:
            return loss
        if self._shards is None:
            self._step_whole(here)
        else:
            self._step_sharded(here, self._shards)
        return loss

    def _step_whole(self, here: list[tuple[Group, Tensor]]) -> None:
        """Every parameter is a layer, and all of them are here."""
        if any(id(p) not in self._own for _, p in here):
            raise RuntimeError(
                f"{type(self).__name__} was given other parameters than it was built with: a ZeRO wrapper has "
                "flattened them, and trust ratios of flat shards would be wrong. Let DeepSpeed build it: "
                f"\"optimizer\": {{\"type\": \"Zero{type(self).__name__}\"}}, with ds_looksam imported")
        if not here:
            return
        parameters = [cast(nn.Parameter, p) for _, p in here]
        if self._layers is None or self._layers_of != [id(p) for p in parameters]:
            self._layers_of = [id(p) for p in parameters]
            self._layers = LayerMap([[Segment(p, 0, 0, p.numel())] for p in parameters],
                                    [p.numel() for p in parameters], [parameters], parameters[0].device)
        norms = self._layers.zeros(2)
        self.begin_update()
        flats = [Flat(i, group, p, p.grad, self.state[p]) for i, (group, p) in enumerate(here)]
        self._gather(self._layers, flats, norms)
        self._apply(self._layers, norms)

    def _step_sharded(self, here: list[tuple[Group, Tensor]], shards: GradientShards) -> None:
        """The next flat tensors in the wrapper's order; the update happens with the last of them."""
        layers = self._layers
        assert layers is not None
        if self._norms is None:
            self._norms = layers.zeros(2)
        first = len(self._gathered)
        flats = [Flat(first + n, group, p, p.grad, self.state[p]) for n, (group, p) in enumerate(here)]
        self._gather(layers, flats, self._norms)
        if len(self._gathered) < len(shards.group_of):
            return
        self._apply(layers, sum_over_ranks(self._norms, shards.process_group))
        for i in range(first):
            shards.cast_weights(i)

    def _gather(self, layers: LayerMap, flats: list[Flat], norms: Tensor) -> None:
        """Phase one: moments, and the squares of ‖w_l‖ and of what gather() returns added to ``norms`` [L + 1, 2]."""
        for flat in flats:
            flat.state["step"] += 1
        for group, step, ranges, (w, g, *moments) in _batches(flats, self.STATE):
            update = self.gather(group, step, w, g, moments)
            if group["trust_ratio"]:
                layers.add_squares_(norms[:, 0], ranges, w)
                layers.add_squares_(norms[:, 1], ranges, update)
        self._gathered += [flat if self.needs_gradient else replace(flat, gradient=None) for flat in flats]

    def _apply(self, layers: LayerMap, norms: Tensor) -> None:
        """Phase two. ``norms``: float64 [L + 1, 2], of whole layers."""
        w_norm, update_norm = norms.sqrt().unbind(1)
        defined = (w_norm > 0) & (update_norm > 0)
        for group, step, ranges, (w, *rest) in _batches(self._gathered, self.STATE):
            ratio = torch.ones_like(w_norm)
            if group["trust_ratio"]:
                ratio = self.trust_ratio(group, w_norm, update_norm)
                ratio = torch.where(defined & torch.isfinite(ratio), ratio, torch.ones_like(ratio))
            factors = (group["lr"] * ratio).to(w[0].dtype)
            self.apply(group, step, [layers.expand(factors, *r) for r in ranges], w, rest)
        self.begin_update()

    # What a subclass is ---------------------------------------------------------------------------------------------

    needs_gradient = False
    """Whether phase two reads the gradient. If so it is kept until then: one more shard during the step."""

    @abstractmethod
    def gather(self, group: Group, step: int, w: Parts, g: Parts, moments: list[Parts]) -> Parts:
        """Phase one: update the moments in place, if that can be done before the trust ratio is known. Returns parts
        whose norm per layer trust_ratio() gets.

        Args:
            step: number of this update, from 1.
            w, g: flat parts [n] of weights and gradients.
            moments: for each name in STATE, the same parts of it.
        """

    @abstractmethod
    def trust_ratio(self, group: Group, w_norm: Tensor, update_norm: Tensor) -> Tensor:
        """Per layer, float64. Where ‖w_l‖ or ‖update_l‖ is 0 or the result is not finite, 1 is used instead."""

    @abstractmethod
    def apply(self, group: Group, step: int, factors: Parts, w: Parts, rest: list[Parts]) -> None:
        """Phase two: write the new weights to ``w``.

        Args:
            factors: lr times trust ratio, for each part of ``w`` 0-dim or [n].
            rest: parts of the gradient if ``needs_gradient``, then of the STATE tensors.
        """

    def _initialize(self, p: Tensor) -> None:
        if not p.is_contiguous():
            raise ValueError(f"{type(self).__name__} needs contiguous parameters, got strides {tuple(p.stride())} for "
                             f"shape {tuple(p.shape)}")
        state = self.state[p]
        state.setdefault("step", 0)
        for name in self.STATE:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Flat:
    """One parameter as step() saw it: number ``index`` of the update."""

    index: int
    group: Group
    parameter: Tensor
    gradient: Tensor | None
    state: dict[str, Any]

    def tensors(self, names: tuple[str, ...]) -> list[Tensor]:
        """The parameter, the gradient if there is one, and the state, each [numel]."""
        gradient = [] if self.gradient is None else [self.gradient.detach().reshape(-1)]
        return [self.parameter.detach().view(-1), *gradient, *(self.state[name].view(-1) for name in names)]


def _batches(flats: list[Flat], names: tuple[str, ...]) -> Iterator[tuple[Group, int, list[Range], list[Parts]]]:
    """Parts of ``flats`` to be worked on together: of one group and step, and about a chunk in all.

    On a GPU that is few launches however many parameters there are; on a CPU a part is still in the cache when the next
    operation reads it. Yields the group, the step, where the parts lie, and for each tensor of Flat.tensors its parts.
    """
    batch: list[tuple[Range, list[Tensor]]] = []
    filled, group, step = 0, None, 0
    for flat in flats:
        tensors, flat_step, most = flat.tensors(names), int(flat.state["step"]), chunk_size(flat.parameter.device)
        for lo, hi in chunks(flat.parameter.numel(), most):
            full = filled + hi - lo > most
            if group is not None and (full or flat.group is not group or flat_step != step):
                yield group, step, [r for r, _ in batch], _columns(batch)
                batch, filled = [], 0
            batch.append(((flat.index, lo, hi), [t[lo:hi] for t in tensors]))
            filled, group, step = filled + hi - lo, flat.group, flat_step
    if group is not None:
        yield group, step, [r for r, _ in batch], _columns(batch)


def _columns(batch: list[tuple[Range, list[Tensor]]]) -> list[Parts]:
    return [list(column) for column in zip(*(parts for _, parts in batch), strict=True)]
