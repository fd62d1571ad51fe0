"""What benchmarks/evidence.py trains on: Fashion-MNIST with a small ViT, the example's text with a small GPT-2.

A task's data lies on the device as a whole, and a batch is a list of indices: small models are fast only so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SUBSET_SEED, WRONG_SEED, PRETRAIN_SEED, PRETRAIN_UPDATES = 5_000, 20, 1_000, 600
"""Of what all runs share: which 5,000 images, which labels are wrong and how, the model that LoRA adapts."""


@dataclass(frozen=True)
class Task:
    """One thing to learn.

    Attributes:
        batch: examples an update, over all ranks; ``micro_batch`` of them share a perturbation in the ascent modes
            by micro-batch. All other methods take a rank's part of the batch at once.
        updates: of the methods that are compared at equal updates.
        lrs, rhos: what tuning tries, each with each, if this task is tuned on itself.
        images, wrong: of "images": how many to train on, and which part of them has a wrong label.
        tuned_on: the task whose tuning runs choose this one's lr and rho. Where its batch is another, the lr goes with
            the square root of the batch.
        tuning: what part of the updates a tuning run takes.
    """

    name: str
    about: str
    kind: Literal["images", "text", "lora"]
    batch: int
    micro_batch: int
    updates: int
    lrs: tuple[float, ...]
    tuned_on: str
    rhos: tuple[float, ...] = (0.02, 0.05, 0.12)
    tuning: float = 1.0
    weight_decay: float = 0.1
    base: str = "AdamW"
    images: int = 0
    wrong: float = 0.0
    model: str = "nano/7"

    @property
    def metric(self) -> str:
        return "test accuracy, %" if self.kind == "images" else "validation loss, nats a byte"

    @property
    def more_is_better(self) -> bool:
        return self.kind == "images"

    @property
    def digits(self) -> int:
        """Of a score, behind the point."""
        return 2 if self.more_is_better else 4


def _catalogue() -> dict[str, Task]:
    kinds = []
    for labels, wrong in (("wrong", 0.2), ("clean", 0.0)):
        what = "20 % wrong labels" if wrong else "clean labels"
        half = Task(f"5k-{labels}", f"5,000 images, {what}, tuned by half runs", "images", 250, 50, 600, (1e-3, 3e-3),
                    "5k-wrong", rhos=(0.05, 0.12, 0.3), tuning=0.5, images=5_000, wrong=wrong)
        # AdamW overfits wrong labels: half a run shows nothing of that.
        whole = replace(half, name=f"5k-{labels}-whole", about=f"5,000 images, {what}", lrs=(5e-4, 1e-3, 3e-3),
                        tuned_on=f"5k-{labels}-whole", rhos=Task.rhos, tuning=Task.tuning)
        # No rho of 0.12: it was the worst in each of the ten tasks that had been tuned by whole runs before these.
        all_images = replace(whole, name=f"60k-{labels}", about=f"60,000 images, {what}", updates=1_200,
                             lrs=(1e-3, 3e-3, 6e-3), rhos=(0.02, 0.05), tuned_on=f"60k-{labels}", images=60_000)
        kinds.append((whole, all_images, half))
    tasks = [task for kind in zip(*kinds, strict=True) for task in kind]
    for base, lrs in (("AdamW", (4e-3, 8e-3, 1.6e-2)), ("Lamb", (2e-2, 4e-2, 8e-2))):
        for batch in (256, 1024, 4096, 8192):
            tasks.append(Task(f"batch-{base}-{batch}", f"60,000 images, 10 epochs, batch {batch:,}, {base}", "images",
                              batch, 256, 10 * (60_000 // batch), lrs, f"batch-{base}-{max(1024, batch)}", base=base,
                              images=60_000))
    tasks.append(Task("gpt2", "GPT-2 (4 layers of 128) from scratch on English", "text", 16, 4, 600,
                      (1e-3, 3e-3, 6e-3), "gpt2"))
    tasks.append(Task("lora", "the same model, LoRA of rank 8 on Python source", "lora", 16, 4, 300,
                      (1e-3, 3e-3, 1e-2), "lora"))
    # Both texts come with Python, and LoRA's base is trained where the run is: on another machine it is another task.
    tasks += [replace(task, name=f"{task.name}-cpu", about=f"{task.about}, on a CPU") for task in tasks[-2:]]
    return {task.name: task for task in tasks}


TASKS = _catalogue()


@dataclass(frozen=True)
class Data:
    """Tensors on the device. Images: inputs float32 [N, 1, 28, 28] and labels int64 [N]; text: inputs int64
    [N, 128], which are their own labels."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    def batch(self, indices: Tensor, test: bool = False) -> dict[str, Tensor]:
        """The model's keyword arguments. ``indices``: int64 [B], on the device."""
        inputs, labels = (self.test_inputs, self.test_labels) if test else (self.inputs, self.labels)
        name = "pixel_values" if inputs.dim() == 4 else "input_ids"
        return {name: inputs[indices], "labels": labels[indices]}


def load(task: Task, folder: Path, device: torch.device) -> Data:
    """The data of a task; what several tasks share is read once a process."""
    if task.kind != "images":
        return _text(task.kind, device)
    data = _fashion_mnist(folder, device)
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(SUBSET_SEED))[:task.images]
    labels = wrong_labels(data.labels.cpu()[chosen], task.wrong).to(device)
    return Data(data.inputs[chosen.to(device)], labels, data.test_inputs, data.test_labels)


def wrong_labels(labels: Tensor, part: float, classes: int = 10) -> Tensor:
    """``labels`` int64 [N] with exactly that part of them replaced by another class, each other one equally likely."""
    generator = torch.Generator().manual_seed(WRONG_SEED)
    chosen = torch.randperm(len(labels), generator=generator)[:round(part * len(labels))]
    shift = torch.randint(1, classes, (len(chosen), ), generator=generator)
    labels = labels.clone()
    labels[chosen] = (labels[chosen] + shift) % classes
    return labels


@functools.lru_cache(1)
def _fashion_mnist(folder: Path, device: torch.device) -> Data:
    from images import open_images

    tensors = []
    for split in open_images(folder):
        pixels, labels = split.__getitems__(list(range(len(split))))
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (split.mean, split.std))
        tensors += [pixels.to(device).float().div_(255).sub_(mean).div_(std), labels.to(device)]
    return Data(*tensors)


@functools.lru_cache(2)
def _text(kind: str, device: torch.device) -> Data:
    from examples import gpt2_lora

    train, held_out = gpt2_lora.split(gpt2_lora.english() if kind == "text" else gpt2_lora.python_source())
    blocks, test = train.blocks.long().to(device), held_out.blocks.long().to(device)
    return Data(blocks, blocks, test, test)


def build(task: Task, seed: int, device: torch.device) -> nn.Module:
    """The model before training. The LoRA task's base is the same for all seeds; its adapters are not."""
    if task.kind == "images":
        from vits import build_vit

        torch.manual_seed(seed)
        return build_vit(task.model, 28, 1, 10)
    if task.kind == "text":
        return _gpt2(seed)
    from peft import LoraConfig, get_peft_model

    model = _gpt2(PRETRAIN_SEED)
    model.load_state_dict(_pretrained(device))
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True,
                                            task_type="CAUSAL_LM"))


def _gpt2(seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    from examples.gpt2_lora import BYTES, CONTEXT

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=BYTES, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4,
                                      bos_token_id=0, eos_token_id=0))


@functools.lru_cache(1)
def _pretrained(device: torch.device) -> dict[str, Tensor]:
    """AdamW on the English text, by torch alone: what LoRA adapts, none of the contenders."""
    data, model = _text("text", device), _gpt2(PRETRAIN_SEED).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(PRETRAIN_SEED)
    for _ in range(PRETRAIN_UPDATES):
        indices = torch.randint(len(data.inputs), (16, ), generator=generator).to(device)
        model(**data.batch(indices)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.cpu() for name, value in model.state_dict().items()}
