"""The engine of ``"type": "ZeroLamb"`` and ``"ZeroLars"``, and what LookSAM's engine shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..arithmetic.layout import LayerMap
from ..config.accept import accept, explain_unknown_key, refuse_model
from ..optimizers import LAYERWISE_OPTIMIZERS, LayerwiseOptimizer
from ..shards import GradientShards, open_shards
from .host import HostEngine, given_json


class LayerwiseEngine(HostEngine):
    """A DeepSpeedEngine that knows which parameters its shards hold, and can have an optimizer with trust ratios.

    Subclasses call :meth:`open_shards` when the engine is built, and :meth:`start_update` before each update.
    """

    _shards: GradientShards
    _group_parameters: list[list[torch.nn.Parameter]]
    _layer_map: LayerMap | None = None

    def own_optimizer_class(self) -> type[torch.optim.Optimizer] | None:
        return LAYERWISE_OPTIMIZERS.get(self.optimizer_name() or "")

    def prepare_base_optimizer(self, build: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        optimizer = build()
        # Whole parameters, the same lists on every rank; the wrapper will put flat shards in their place.
        self._group_parameters = [list(group["params"]) for group in optimizer.param_groups if group["params"]]
        if isinstance(optimizer, LayerwiseOptimizer):
            optimizer.wait_for_wrapper()
        return optimizer

    def open_shards(self) -> GradientShards:
        """The room for the wrapper; a base optimizer with trust ratios learns what lies in its shards."""
        self._shards = open_shards(self)
        if isinstance(self.basic_optimizer, LayerwiseOptimizer):
            self.basic_optimizer.bind(self.layers(), self._shards)
        return self._shards

    def layers(self) -> LayerMap:
        """Which layer each element of the shards belongs to. Built on first use, not collective."""
        if self._layer_map is None:
            shards = self._shards
            self._layer_map = LayerMap(shards.layout(), shards.flat_sizes(), self._group_parameters, shards.device)
        return self._layer_map

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As DeepSpeed's. Which param groups have trust ratios stays what this run's groups say.

        DeepSpeed 0.19.8 gives every group the keys of the first one when ZeRO-3 loads a universal checkpoint.
        """
        groups = self.basic_optimizer.param_groups
        wanted = [group.get("trust_ratio") for group in groups]
        loaded = super().load_checkpoint(*args, **kwargs)
        for group, value in zip(self.basic_optimizer.param_groups, wanted, strict=True):
            if value is not None:
                group["trust_ratio"] = value
        return loaded

    def start_update(self) -> None:
        """An update begins: whatever an interrupted one has left in the optimizer is forgotten."""
        if isinstance(self.basic_optimizer, LayerwiseOptimizer):
            self.basic_optimizer.begin_update()


class ZeroOptimizerEngine(LayerwiseEngine):
    """A DeepSpeedEngine with LAMB or LARS on ZeRO shards, without LookSAM. Everything else is DeepSpeed's.

    Made by ``deepspeed.initialize`` when the JSON says ``"optimizer": {"type": "ZeroLamb"}`` or ``"ZeroLars"``.
    """

    def __init__(self, *args: Any, config_class: Any, **kwargs: Any) -> None:
        accept(config_class, given_json(config_class), client_optimizer=kwargs.get("optimizer"))
        super().__init__(*args, config_class=config_class, **kwargs)
        self.open_shards()

    def prepare_base_optimizer(self, build: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        refuse_model(self)
        try:
            return super().prepare_base_optimizer(build)
        except TypeError as error:
            raise explain_unknown_key(error, self.optimizer_name()) from error

    def update_at_boundary(self, apply_update: Callable[[], None]) -> None:
        self.start_update()
        self._shards.keep_gradient()
        try:
            apply_update()
        finally:
            self._shards.end_window()
