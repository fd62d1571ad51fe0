"""PEFT LoRA under the Hugging Face Trainer: a run resumed from the Trainer's checkpoint ends where the undisturbed one
does, to the bit, and what ``save_pretrained`` writes are the weights the engine trained, never perturbed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .ranks import run_on_ranks
from .test_huggingface import Run, assert_same, forget_accelerate, model, sample
from .training import master_weights

pytest.importorskip("accelerate")
pytest.importorskip("peft")

STEPS, STOP, K = 7, 5, 3
"""Stopped between two SAM steps: the reuse step that follows takes g_v from the checkpoint."""


def train_lora(stage: int, folder: str, resume: bool, stop: int | None) -> tuple[dict[str, Tensor], int, list[Any]]:
    """On a rank: the trained weights, the evaluations, and the adapters saved at step STOP and at the end."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import ds_looksam  # noqa: F401

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == stop

    forget_accelerate()
    run = Run(stage=stage, k=K, dropout=0.0)
    torch.manual_seed(3)
    adapted = get_peft_model(model(run), LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True,
                                                    task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=folder, deepspeed=run.json(), max_steps=STEPS, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, learning_rate=1e-2, weight_decay=0.01, max_grad_norm=0.5, save_strategy="steps",
        save_steps=STOP, train_sampling_strategy="sequential", report_to=[], use_cpu=True, disable_tqdm=True)
    hf = Trainer(model=adapted, args=arguments, train_dataset=[sample(i) for i in range(120)], callbacks=[Stop()])
    hf.train(resume_from_checkpoint=resume or None)
    engine = hf.model_wrapped
    weights, evaluations = master_weights(engine), engine.looksam.evaluations
    hf.save_model(folder)
    torch.distributed.barrier()
    saved = [load_file(Path(folder) / sub / "adapter_model.safetensors") for sub in (f"checkpoint-{STOP}", "")]
    hf.accelerator.free_memory()
    # PEFT leaves the adapter's name out of what it saves.
    return ({name.replace(".default", ""): w for name, w in weights.items() if "lora_" in name}, evaluations, saved)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_lora_run_is_the_one_that_never_stopped(stage: int, tmp_path: Path) -> None:
    runs = [run_on_ranks(2, train_lora, stage, str(tmp_path / folder), resume, stop)
            for folder, resume, stop in [("parts", False, STOP), ("parts", True, None), ("whole", False, None)]]
    for (first, until, saved), (got, evaluations, at_end), (expected, *whole) in zip(*runs, strict=True):
        assert (until, evaluations, whole[0]) == (STOP + 2, STEPS + 3, STEPS + 3)
        assert_same(got, expected)
        # The checkpoint's own adapter file, written in the middle of a cycle, and the one at the end.
        assert_same(saved[0], first)
        assert_same(at_end[1], expected)
        assert any(not torch.equal(first[name], w) for name, w in got.items())
