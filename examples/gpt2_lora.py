"""A language model with the Hugging Face Trainer, PEFT LoRA and LookSAM: what differs from a script without LookSAM is
``import ds_looksam`` and the optimizer block of ds_config.json.

    deepspeed examples/gpt2_lora.py                                                    # on GPUs
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/gpt2_lora.py --steps 100 --lora-steps 100

A small byte-level GPT-2 is trained from scratch on the language reference that comes with Python (English), then
adapted with LoRA to the standard library's source code (Python). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import ds_looksam

CONTEXT = 128
BYTES = 256


class Text(torch.utils.data.Dataset):
    """A text as blocks of CONTEXT bytes, each its own label."""

    def __init__(self, text: str) -> None:
        data = text.encode()
        self.blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8)[:len(data) // CONTEXT * CONTEXT]
        self.blocks = self.blocks.view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        block = self.blocks[i].long()
        return {"input_ids": block, "labels": block}


def split(text: str) -> tuple[Text, Text]:
    """(train, held out), the last twentieth held out."""
    cut = len(text) * 19 // 20
    return Text(text[:cut]), Text(text[cut:])


def english() -> str:
    return "\n".join(topics.values())


def python_source() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join(path.read_text(errors="ignore") for path in sorted(folder.glob("*.py")))[:2_000_000]


class LogLookSAM(TrainerCallback):
    """LookSAM's measurements beside the Trainer's own, wherever ``report_to`` sends those."""

    def on_step_end(self, args, state, control, **kwargs):
        looksam, should_log = self.trainer.model_wrapped.looksam, control.should_log
        if looksam.step_kind == "sam":
            self.trainer.log({f"looksam_{name}": value for name, value in looksam.measurements().items()})
            control.should_log = should_log  # what trainer.log takes for done


def build_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=BYTES, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4,
                                      bos_token_id=0, eos_token_id=0))


def train(model: Any, text: str, steps: int, learning_rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Train with the Trainer; losses on held-out text in nats per byte, and LookSAM's own numbers."""
    training, held_out = split(text)
    callback = LogLookSAM()
    trainer = Trainer(
        model=model, callbacks=[callback], train_dataset=training,
        eval_dataset=torch.utils.data.Subset(held_out, range(args.held_out)),
        args=TrainingArguments(
            output_dir=args.output_dir, deepspeed=str(args.config), max_steps=steps, learning_rate=learning_rate,
            per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulation,
            weight_decay=0.1, warmup_steps=steps // 10, logging_steps=20, eval_strategy="steps",
            eval_steps=max(1, steps // 4), save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available()))
    callback.trainer = trainer
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    engine = trainer.model_wrapped
    assert isinstance(engine, ds_looksam.LookSAMEngine)
    looksam = engine.looksam.as_dict()
    trainer.save_model()
    trainer.accelerator.free_memory()
    return {"held_out_losses": losses, "looksam": looksam, "log": trainer.state.log_history}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "ds_config.json")
    parser.add_argument("--output-dir", default="runs/gpt2-lora")
    parser.add_argument("--steps", type=int, default=1000, help="updates of the training from scratch")
    parser.add_argument("--lora-steps", type=int, default=500, help="updates of the adaptation")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks per rank and micro-batch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=128, help="held-out blocks to evaluate on")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    args = parse_args(argv)
    model = build_model()
    scratch = train(model, english(), args.steps, 1e-3, args)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True,
                                               task_type="CAUSAL_LM"))
    lora = train(adapted, python_source(), args.lora_steps, 3e-3, args)
    if torch.distributed.get_rank() == 0:
        for name, result in (("from scratch", scratch), ("LoRA", lora)):
            looksam = result["looksam"]
            print(f"{name}: held-out loss {' '.join(f'{x:.3f}' for x in result['held_out_losses'])} nats per byte, "
                  f"{looksam['updates']} updates, {looksam['evaluations']} gradient evaluations")
    return {"scratch": scratch, "lora": lora}


if __name__ == "__main__":
    main()
