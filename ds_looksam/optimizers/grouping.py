"""The usual param groups, by parameter name: no weight decay, and nothing layer-wise, for biases, norms, embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..shards import full_shape

KINDS = ("bias", "norm", "embedding", "vector")


def parameter_groups(model: nn.Module, *, no_decay: Iterable[str] = ("bias", "norm"),
                     no_layer_scaling: Iterable[str] = (), weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Param groups for ``deepspeed.initialize(model_parameters=...)``.

    ::

        groups = ds_looksam.parameter_groups(model, no_decay=["bias", "norm"], no_layer_scaling=["bias", "norm"])
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config="config.json")

    A parameter is selected by one of these kinds, or by a pattern with ``*`` for its full name
    (``"vit.encoder.layer.0.*"``):

    - ``"bias"``: called ``bias``, ``..._bias`` or ``bias_...``, also those of norms;
    - ``"norm"``: belongs to a module whose class is called something with Norm (LayerNorm, BatchNorm2d, LlamaRMSNorm);
    - ``"embedding"``: belongs to an nn.Embedding or nn.EmbeddingBag, or is itself called ``...embed...`` or
      ``..._token``, as a ViT's class token and position embeddings are;
    - ``"vector"``: has at most one dimension. Works under ``deepspeed.zero.Init`` too, where ``parameter.shape`` is
      hidden.

    A tied parameter appears once, and counts as everything that any of its names says. Frozen parameters are left out.

    Args:
        no_decay: these get ``"weight_decay": 0.0``.
        no_layer_scaling: these keep trust ratio 1: ``"layerwise": False`` for Look-LayerSAM and
            ``"trust_ratio": False`` for LAMB and LARS. Remember that with LARS their step is then lr itself.
        weight_decay: of the others; None leaves it to the JSON.

    Returns:
        At most four dicts with ``params`` and the keys above where they differ from the JSON. The same order on every
        rank; empty groups are left out.

    Raises:
        ValueError: a pattern selects no trained parameter, or something is neither a kind nor a pattern.
    """
    decay_selectors, scaling_selectors = _checked(no_decay, "no_decay"), _checked(no_layer_scaling, "no_layer_scaling")
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            names.setdefault(p, []).append(name)
    for selector in (*decay_selectors, *scaling_selectors):
        if selector not in KINDS and not any(fnmatchcase(n, selector) for known in names.values() for n in known):
            raise ValueError(f"the pattern {selector!r} matches no trained parameter")

    chosen: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p, known in names.items():
        owners = [(name, modules[name.rpartition(".")[0]]) for name in known]
        decays, scaled = (not any(_selects(s, name, owner, p) for s in selectors for name, owner in owners)
                          for selectors in (decay_selectors, scaling_selectors))
        chosen.setdefault((decays, scaled), []).append(p)
    groups = []
    for (decays, scaled), params in sorted(chosen.items(), reverse=True):
        group: dict[str, Any] = {"params": params}
        if not decays or weight_decay is not None:
            group["weight_decay"] = weight_decay if decays else 0.0
        if not scaled:
            group |= {"layerwise": False, "trust_ratio": False}
        groups.append(group)
    return groups


def _selects(selector: str, name: str, owner: nn.Module, p: nn.Parameter) -> bool:
    own_name = name.rpartition(".")[2]
    if selector == "bias":
        return own_name == "bias" or own_name.endswith("_bias") or own_name.startswith("bias_")
    if selector == "norm":
        return "norm" in type(owner).__name__.lower()
    if selector == "embedding":
        return isinstance(owner, nn.Embedding | nn.EmbeddingBag) or "embed" in own_name or own_name.endswith("_token")
    if selector == "vector":
        return len(full_shape(p)) <= 1
    return fnmatchcase(name, selector)


def _checked(selectors: Iterable[str], argument: str) -> list[str]:
    if isinstance(selectors, str):
        raise ValueError(f"{argument}: give a list of kinds and patterns, not the string {selectors!r}")
    selectors = list(selectors)
    for selector in selectors:
        if selector not in KINDS and not any(c in selector for c in "*?["):
            raise ValueError(f"{argument}: {selector!r} is neither a kind ({', '.join(KINDS)}) nor a pattern with *")
    return selectors
