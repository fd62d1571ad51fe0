"""parameter_groups: who is in which group, also where zero.Init hides the shapes, and what comes of it in training."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import ds_looksam

from .models import make_model
from .ranks import run_on_ranks
from .training import Case, train_window

LEFT_OUT = {"layerwise": False, "trust_ratio": False}


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                               intermediate_size=16, image_size=8, patch_size=4, num_channels=1))


def grouped(model: nn.Module, **arguments: Any) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The groups, and what each parameter's has of its own."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = ds_looksam.parameter_groups(model, **arguments)
    return groups, {names[id(p)]: {key: value for key, value in group.items() if key != "params"}
                    for group in groups for p in group["params"]}


def test_kinds_of_a_vit() -> None:
    model = vit()
    _, of = grouped(model, no_decay=["bias", "norm", "embedding"], no_layer_scaling=["bias", "norm"])
    assert of.keys() == dict(model.named_parameters()).keys()
    for name, group in of.items():
        norm_or_bias = name.endswith("bias") or "norm" in name
        embedding = name in ("vit.embeddings.cls_token", "vit.embeddings.position_embeddings")
        assert group == {**({"weight_decay": 0.0} if norm_or_bias or embedding else {}),
                         **(LEFT_OUT if norm_or_bias else {})}, name


def test_default_is_no_decay_for_biases_and_norms() -> None:
    groups, of = grouped(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), weight_decay=0.3)
    assert of == {"0.weight": {"weight_decay": 0.3}, **{name: {"weight_decay": 0.0}
                                                        for name in ("0.bias", "1.weight", "1.bias")}}
    assert len(groups) == 2


def test_patterns_frozen_and_tied() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(5, 3), "out": nn.Linear(3, 5), "frozen": nn.Linear(2, 2)})
    model["out"].weight = model["words"].weight
    model["frozen"].requires_grad_(False)
    assert grouped(model, no_decay=["embedding"])[1] == {"words.weight": {"weight_decay": 0.0}, "out.bias": {}}
    by_other_name = grouped(model, no_decay=["out.w*"], no_layer_scaling=["out.*"])[1]
    assert by_other_name == {"words.weight": {"weight_decay": 0.0, **LEFT_OUT}, "out.bias": LEFT_OUT}


@pytest.mark.parametrize("arguments, message", [
    ({"no_decay": ["encoder.*"]}, "matches no trained parameter"),
    ({"no_decay": ["biases"]}, "neither a kind"),
    ({"no_layer_scaling": "bias"}, "give a list"),
], ids=["pattern", "kind", "string"])
def test_selectors_that_select_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ds_looksam.parameter_groups(vit(), **arguments)


def _groups_under_zero_init(case: Case) -> tuple[dict[str, dict[str, Any]], int]:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=case.json()):
        model = make_model(case.model)
    assert next(model.parameters()).shape == (0, )
    groups, names = grouped(model, no_decay=["vector"], no_layer_scaling=["vector"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=case.json())
    try:
        for update in range(4):
            train_window(engine, case, update)
        for key in LEFT_OUT:
            assert [group[key] for group in engine.optimizer.param_groups] == [True, False]
        return names, engine.looksam.evaluations
    finally:
        engine.destroy()


def test_shapes_hidden_by_zero_init() -> None:
    case = Case(stage=3, base="Lamb", layer_scale="norm", k=2)
    expected = {name: {"weight_decay": 0.0, **LEFT_OUT} if p.ndim <= 1 else {}
                for name, p in make_model(case.model).named_parameters()}
    assert any(expected.values()) and not all(expected.values())
    assert run_on_ranks(2, _groups_under_zero_init, case) == [(expected, 6)] * 2
