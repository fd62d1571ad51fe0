"""One run of benchmarks/evidence.py: train through deepspeed.initialize, test on the way, measure sharpness at last."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence_methods import METHODS, MomentumAscent, ReuseRule
from benchmarks.evidence_tasks import TASKS, Data, Task, build, load

WARMUP, POINTS = 0.1, 12
"""The learning rate rises over that part of a run and falls as a cosine; the test set is evaluated that many times."""
RADIUS, SAMPLE, POWER_STEPS = 0.1, 500, 20
"""Sharpness: how far along the gradient, on the first so many training examples, iterations for the eigenvalue."""


@dataclass(frozen=True)
class Job:
    """What identifies a run. ``lr`` and ``rho`` None: those that the tuning runs have chosen, see evidence_plan.py."""

    task: str
    method: str
    seed: int
    updates: int
    lr: float | None = None
    rho: float | None = None
    tuning: bool = False
    world: int = 1


def train(job: Job, folder: Path, deadline: float = float("inf")) -> dict[str, Any] | None:
    """Collective. The record of the run, on every rank; None if ``deadline`` (``time.time()``) came first, which is
    looked at on one rank only."""
    import deepspeed
    import distributed
    from order import TrainingOrder
    from train import warmup_then_cosine

    task, method = TASKS[job.task], METHODS[job.method]
    assert job.lr is not None
    world, rank, device = torch.distributed.get_world_size(), torch.distributed.get_rank(), distributed.device()
    data = load(task, folder, device)
    config = method.config(task, world, job.lr, job.rho)
    micro_batch = config["train_micro_batch_size_per_gpu"]
    order = TrainingOrder(len(data.inputs), task.batch, micro_batch, rank, world, job.seed)
    model = build(task, job.seed, device)
    engine, *_ = deepspeed.initialize(model=model, config=config, lr_scheduler=warmup_then_cosine(job.updates, WARMUP),
                                      model_parameters=[p for p in model.parameters() if p.requires_grad])
    torch.manual_seed(job.seed + 1 + rank)  # another dropout mask on each rank
    try:
        msam = MomentumAscent(engine, job.rho or 0.0) if method.type == "MSAM" else None
        rule = ReuseRule(engine, **method.reuse) if method.reuse else None
        tests = {round(job.updates * (i + 1) / POINTS) for i in range(POINTS)} | {job.updates}
        points: list[list[float | None]] = []
        cosines: list[Tensor] = []
        windows: Iterator[Tensor] = iter(())  # [accumulation, micro_batch] each, int64
        seconds, start, update = 0.0, time.perf_counter(), 0
        accumulation = engine.gradient_accumulation_steps()
        engine.train()
        while update < job.updates:
            if update % order.updates_per_epoch == 0:
                epoch = torch.tensor(order.micro_batches(update), device=device)
                windows = iter(epoch.view(-1, accumulation, micro_batch))
            if world == 1 and time.time() > deadline:
                return None
            if msam is not None:
                msam.begin()
            for i, micro in enumerate(next(windows)):
                engine.backward(engine(**data.batch(micro)).loss)
                if msam is not None and i == accumulation - 1:
                    msam.end()
                engine.step()
            update += 1
            if rule is not None:
                rule.after_update()
            status = getattr(engine, "looksam", None)
            if status is not None and status.step_kind == "sam" and status.orthogonal_cosine is not None:
                cosines.append(status.orthogonal_cosine)  # stays on the device until it is read below
            if update in tests:
                _wait(device)
                seconds += time.perf_counter() - start
                points.append([update, status.evaluations if status else update, round(seconds, 3),
                               round(test(engine, data, task), 4), _mean(cosines),
                               _mean([status.beta]) if status and status.beta is not None else None])
                cosines = []
                start = time.perf_counter()
        record = asdict(job) | {
            "points": points, "evaluations": points[-1][1], "seconds": points[-1][2], "score": points[-1][3],
            "metric": task.metric, "batch": task.batch, "micro_batch": micro_batch, "m": method.examples(task, world),
            **sharpness(engine.module, data, task), "device": _device_name(device), "torch": torch.__version__}
    finally:
        engine.destroy()
        del engine, model
        gc.collect()
    return record


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def _mean(values: list[Tensor]) -> float | None:
    return round(torch.stack(values).mean().item(), 4) if values else None


@torch.no_grad()
def test(engine: Any, data: Data, task: Task) -> float:
    """Accuracy in %, or mean loss, over the whole test set, each rank taking its share. Collective."""
    import distributed

    engine.eval()
    size = 1_000 if task.kind == "images" else 64
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sums = torch.zeros(2, dtype=torch.float64, device=data.inputs.device)
    for indices in torch.arange(rank, len(data.test_labels), world, device=data.inputs.device).split(size):
        batch = data.batch(indices, test=True)
        output = engine(**batch)
        good = output.loss * len(indices)
        if task.more_is_better:
            good = (output.logits.argmax(-1) == batch["labels"]).sum()
        sums += torch.stack([good.double(), sums.new_tensor(len(indices))])
    engine.train()
    total, examples = distributed.summed(sums)
    return total / examples * (100 if task.more_is_better else 1)


def sharpness(model: nn.Module, data: Data, task: Task) -> dict[str, float]:
    """Of the training loss, at the trained weights, on one sample for all methods and seeds.

    ``loss_rise``: L(w + r g / ‖g‖) - L(w) with g the sample's gradient and r ``RADIUS``. ``eigenvalue``: the largest
    one of the Hessian by magnitude, by power iteration from one start for all. Over the parameters that are trained.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model.eval()
    size = SAMPLE if task.kind == "images" else 32
    batch = data.batch(torch.arange(min(size, len(data.inputs)), device=data.inputs.device))
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention cannot be differentiated twice
        loss = model(**batch).loss
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        generator = torch.Generator().manual_seed(0)
        v = [torch.randn(p.shape, generator=generator).to(p.device) for p in parameters]
        eigenvalue = 0.0
        for _ in range(POWER_STEPS):
            norm = _norm(v)
            v = [x / norm for x in v]
            product = torch.autograd.grad(gradient, parameters, v, retain_graph=True)
            eigenvalue = sum((x * y).sum() for x, y in zip(v, product, strict=True)).item()  # type: ignore[union-attr]
            v = list(product)
        with torch.no_grad():
            clean = [p.clone() for p in parameters]
            scale = RADIUS / _norm(gradient)
            for p, g in zip(parameters, gradient, strict=True):
                p.add_(g * scale)
            rise = (model(**batch).loss - loss).item()
            torch._foreach_copy_(parameters, clean)
    return {"loss_rise": round(rise, 5), "eigenvalue": round(eigenvalue, 3)}


def _norm(tensors: Any) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x.detach()) for x in tensors]))
