"""examples/gpt2_lora.py as it is, made small: LookSAM is on in both halves, and LoRA trains its adapters only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .ranks import run_on_ranks
from .test_huggingface import forget_accelerate

pytest.importorskip("peft")


def run_example(folder: str) -> dict[str, Any]:
    from examples import gpt2_lora

    forget_accelerate()
    base = {name: p.clone() for name, p in gpt2_lora.build_model().named_parameters()}
    frozen: dict[str, Any] = {}
    get_peft_model = gpt2_lora.get_peft_model

    def watch(model: Any, config: Any) -> Any:
        frozen.update({name: p.clone() for name, p in model.named_parameters()})
        adapted = get_peft_model(model, config)
        frozen["model"] = adapted
        return adapted

    gpt2_lora.get_peft_model = watch
    try:
        result = gpt2_lora.main(["--steps", "12", "--lora-steps", "7", "--batch-size", "4", "--held-out", "4",
                                 "--accumulation", "2", "--output-dir", folder])
    finally:
        gpt2_lora.get_peft_model = get_peft_model
    after = {name: p for name, p in frozen.pop("model").named_parameters()}
    result["trained"] = [name for name, p in after.items() if p.requires_grad]
    result["adapters_moved"] = all(bool((p != 0).any()) for name, p in after.items() if "lora_B" in name)
    result["base_moved"] = [name for name, p in frozen.items() if not torch.equal(
        after[f"base_model.model.{name}" if f"base_model.model.{name}" in after else
              f"base_model.model.{name}".replace("c_attn.", "c_attn.base_layer.")], p)]
    result["scratch_moved"] = sum(not torch.equal(frozen[name], p) for name, p in base.items()) == len(base)
    return result


def test_the_language_model_example(tmp_path: Path) -> None:
    for result in run_on_ranks(2, run_example, str(tmp_path)):
        for half, updates, evaluations in (("scratch", 12, 12 + 3), ("lora", 7, 7 + 2)):
            assert result[half]["looksam"]["updates"] == updates
            assert result[half]["looksam"]["evaluations"] == evaluations
            assert result[half]["looksam"]["sharpness"] > 0
            logged = [entry for entry in result[half]["log"] if "looksam_gradient_norm" in entry]
            assert [entry["step"] for entry in logged] == [1 + 5 * i for i in range(evaluations - updates)]
        assert result["scratch"]["held_out_losses"][-1] < result["scratch"]["held_out_losses"][0]
        assert result["scratch_moved"]
        assert result["trained"] and all("lora_" in name for name in result["trained"])
        assert result["adapters_moved"] and result["base_moved"] == []
    assert (tmp_path / "adapter_model.safetensors").is_file()
