"""Train a Vision Transformer with LookSAM, or with any other DeepSpeed JSON.

One process, torchrun, deepspeed or mpirun, all the same:

    python launch/train.py --data-dir DIR
    torchrun --standalone --nproc-per-node 8 launch/train.py --data-dir DIR --model B/16 --config configs/FILE.json

DIR holds IDX files or one folder per class (launch/images.py). The run's folder gets metrics.csv, metrics.png and
checkpoints. On SIGTERM or SIGUSR1 it saves and ends with exit code 75; --resume goes on.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import deepspeed
import distributed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from images import Batch, Images, open_images
from order import TrainingOrder, evaluation_shard
from report import Progress, Row, RunLog, plot, say
from stopping import SAVED_TO_GO_ON, Stopped, StopSignals
from torch import Tensor
from torch.utils.data import DataLoader
from vits import build_vit

import ds_looksam  # noqa: F401  (registers LookSAM with DeepSpeed)
from ds_looksam.ranks.agree import from_all_ranks

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # quickstart.sh looks for --run-dir and --resume
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="IDX files, or train/CLASS and val/CLASS folders of images")
    add("--model", default="micro/4", help="ViT size and patch: nano/7, micro/4, S/32, B/16, L/16 (default micro/4)")
    add("--config", type=Path, default=ROOT / "configs" / "looksam_zero2.json", help="DeepSpeed's JSON")
    add("--epochs", type=int, default=10)
    add("--warmup", type=float, default=0.1, help="part of the run in which lr rises, before it falls as a cosine; "
        "a scheduler in the JSON is used instead of both (default 0.1)")
    add("--dropout", type=float, default=0.0)
    add("--image-size", type=int, help="folders of images only (default 224)")
    add("--workers", type=int, help="loader processes a rank (default: 8 for folders, 0 for IDX files)")
    add("--seed", type=int, default=0)
    add("--run-dir", type=Path, help="what the run leaves behind (default runs/MODEL-CONFIG)")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint of the run, if there is one")
    add("--overwrite", action="store_true", help="start again in a folder that has a run in it")
    add("--save-every", type=int, default=0, help="updates between checkpoints, beside that at the end of each epoch")
    add("--keep", type=int, default=3, help="checkpoints to keep, the newest; 0 for all (default 3)")
    add("--log-every", type=int, default=10, help="updates between training lines of metrics.csv (default 10)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_args()
    args.run_dir = args.run_dir or Path("runs") / f"{args.model.replace('/', '-')}-{args.config.stem}"
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.epochs < 1 or args.log_every < 1 or not 0 <= args.warmup < 1:
        parser.error("--epochs and --log-every must be at least 1, --warmup at least 0 and less than 1")
    if args.save_every < 0 or args.keep < 0:
        parser.error("--save-every and --keep must be at least 0")
    return args


def warmup_then_cosine(updates: int, warmup: float) -> Callable[[torch.optim.Optimizer], Any]:
    """The learning rates of the JSON times a factor: up to 1 over ``warmup`` of the run, then down to 0."""
    rising = warmup * updates

    def factor(update: int) -> float:
        if update < rising:
            return (update + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (update - rising) / (updates - rising))))

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass
class Sums:
    """Loss, hits and images since the last time they were taken, kept on the device: no synchronisation to add."""

    values: Tensor  # float64 [3]

    @classmethod
    def zero(cls, device: torch.device) -> Sums:
        return cls(torch.zeros(3, dtype=torch.float64, device=device))

    def add(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """``losses`` [B], one per image, or [] their mean; ``logits`` [B, classes]; ``labels`` [B]."""
        hits = (logits.argmax(-1) == labels).sum()
        total = losses.detach().double().expand(len(labels)).sum()
        count = torch.full_like(total, len(labels))  # made where it is: a copy to the GPU would wait for it
        self.values += torch.stack([total, hits.double(), count])

    def take(self) -> tuple[float, float]:
        """Mean loss and accuracy over all ranks; the sums start again. Collective."""
        loss, hits, images = distributed.summed(self.values)
        self.values.zero_()
        return loss / images, hits / images


def as_it_is(batch: Any) -> Any:
    return batch


def wait_for_the_rank(worker: int) -> None:
    """In a loader's process: whoever ends a job sends SIGTERM to all of its processes, and a worker that ended at once,
    as torch has it, would take its rank along, before that has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Trainer:
    """Engine, data and reports of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = distributed.device()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.train_images, self.test_images = open_images(args.data_dir, args.image_size, args.seed)
        self.data = f"{self.train_images.fingerprint()}, {self.test_images.fingerprint()}"
        distributed.same_on_all_ranks(f"the images in {args.data_dir}", self.data)
        config = DeepSpeedConfig(str(args.config))
        self.order = TrainingOrder(len(self.train_images), config.train_batch_size,
                                   config.train_micro_batch_size_per_gpu, self.rank, self.world_size, args.seed)
        self.total_updates = args.epochs * self.order.updates_per_epoch

        torch.manual_seed(args.seed)
        images = self.train_images
        model = build_vit(args.model, images.size, images.channels, len(images.classes), args.dropout)
        schedule = None if config.scheduler_name else warmup_then_cosine(self.total_updates, args.warmup)
        self.engine, *_ = deepspeed.initialize(model=model, config=str(args.config), lr_scheduler=schedule,
                                               model_parameters=model.parameters())
        torch.manual_seed(args.seed + 1 + self.rank)  # another dropout mask on each rank
        self.dtype = next(model.parameters()).dtype
        self.mean, self.std = (torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (images.mean, images.std))

        self.stop = StopSignals()
        self.sums = Sums.zero(self.device)
        facts: dict[str, Any] = {}
        if args.resume:
            facts, sums = checkpoints.resume(self.engine, args.run_dir, self._identity())
            if sums is not None:
                self.sums.values.copy_(sums)
        self.seconds: float = facts.get("seconds", 0.0)
        self.log = RunLog(args.run_dir / "metrics.csv" if self.rank == 0 else None, resume_at=self.update)
        self.progress = Progress(self.rank == 0, self.total_updates, self.update)

    @property
    def update(self) -> int:
        """Updates so far, skipped ones included: with the seed, the whole position of the run."""
        return self.engine.global_steps

    def run(self) -> str:
        """Train to the end. Returns the closing words.

        Raises:
            Stopped: a signal has told one of the ranks to stop.
        """
        accuracy = None
        while self.update < self.total_updates:
            self.train_epoch()
            loss, accuracy = self.evaluate()
            self.log.write(self._row("test", loss, accuracy))
            self.save()
            self.progress.say(f"epoch {self.update // self.order.updates_per_epoch}/{self.args.epochs}: test loss "
                              f"{loss:.4f}, test accuracy {accuracy:.4f}, {self.seconds:.0f} s of training")
            if self.stop.stopping and self.update < self.total_updates:
                raise Stopped
        self.stop.close()
        if accuracy is None:  # resumed at its end
            _, accuracy = self.evaluate()
        self.progress.close()
        self.log.close()
        return self._report(accuracy)

    def save(self) -> None:
        facts = self._identity() | {"seconds": self.seconds, "ranks": self.world_size}
        checkpoints.save(self.engine, self.args.run_dir, facts, self.sums.values, self.args.keep)

    def train_epoch(self) -> None:
        """From the run's position to the end of its epoch."""
        engine, sums = self.engine, self.sums
        engine.train()
        self.train_images.epoch = self.update // self.order.updates_per_epoch
        logged, images_logged, started = self.seconds, self.update, time.perf_counter() - self.seconds
        for pixels, labels in self._batches(self.train_images, self.order.micro_batches(self.update)):
            before = self.update
            output = engine(pixel_values=pixels, labels=labels)
            engine.backward(output.loss)
            engine.step()
            sums.add(output.loss, output.logits, labels)
            if self.update == before:
                continue
            self.progress.update(self._step_kind())
            if self.update % self.args.log_every == 0 or self.update % self.order.updates_per_epoch == 0:
                loss, accuracy = sums.take()
                self.seconds = time.perf_counter() - started
                speed = (self.update - images_logged) * self.order.global_batch / (self.seconds - logged)
                logged, images_logged = self.seconds, self.update
                row = self._row("train", loss, accuracy, speed)
                self.log.write(row)
                self.progress.set(row)
            stopping = self.stop.ask()
            due = self.args.save_every and self.update % self.args.save_every == 0
            if (stopping or due) and self.update % self.order.updates_per_epoch != 0:  # there it saves after the test
                self.seconds = time.perf_counter() - started
                self.save()
                if stopping:
                    raise Stopped
                started = time.perf_counter() - self.seconds

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the whole test set, each rank taking its share. Collective."""
        self.engine.eval()
        sums = Sums.zero(self.device)
        batch = 2 * self.order.micro_batch
        batches, left = evaluation_shard(len(self.test_images), self.rank, self.world_size, batch)
        for pixels, labels in self._batches(self.test_images, batches):
            logits = self.engine(pixel_values=pixels).logits[:left].float()
            labels = labels[:left]
            left -= len(labels)
            sums.add(torch.nn.functional.cross_entropy(logits, labels, reduction="none"), logits, labels)
        return sums.take()

    def _batches(self, images: Images, indices: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised pixels [B, channels, size, size] in the model's dtype, and labels [B], on the device."""
        workers = self.args.workers if self.args.workers is not None else 8 * (images.channels == 3)
        # A generator of its own: to draw the workers' seeds from torch's would shift a resumed run's dropout masks.
        loader: DataLoader[Batch] = DataLoader(images, batch_sampler=indices, collate_fn=as_it_is, num_workers=workers,
                                               pin_memory=self.device.type != "cpu", generator=torch.Generator(),
                                               worker_init_fn=wait_for_the_rank)
        for pixels, labels in loader:
            pixels = pixels.to(self.device, non_blocking=True).float().div_(255).sub_(self.mean).div_(self.std)
            yield pixels.to(self.dtype), labels.to(self.device, non_blocking=True)

    def _step_kind(self) -> str:
        status = getattr(self.engine, "looksam", None)
        if status is not None:
            return status.step_kind
        return "base" if self.engine.was_step_applied() else "skipped"

    def _row(self, split: str, loss: float, accuracy: float, speed: float | None = None) -> Row:
        status = getattr(self.engine, "looksam", None)
        return Row(split, self.update / self.order.updates_per_epoch, self.update,
                   status.evaluations if status is not None else self.update, self.seconds, loss, accuracy,
                   self.engine.get_lr()[0], speed, self._step_kind() if split == "train" else "")

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it."""
        return {"model": self.args.model, "classes": self.train_images.classes, "image size": self.train_images.size,
                "seed": self.args.seed, "epochs": self.args.epochs, "train_batch_size": self.order.global_batch,
                "data": self.data}

    def _report(self, accuracy: float) -> str:
        run_dir = self.args.run_dir
        images = self.order.global_batch * self.total_updates
        title = (f"ViT {self.args.model}, {self.args.config.stem}, {self.world_size} rank(s): "
                 f"test accuracy {accuracy:.4f} after {self.args.epochs} epochs")
        if self.rank == 0:
            plot(run_dir / "metrics.csv", run_dir / "metrics.png", title)
        return (f"\nTest accuracy  {accuracy:.4f} after {self.args.epochs} epochs, {self.update} updates "
                f"in {self.seconds:.0f} s ({images / max(self.seconds, 1e-9):.0f} images/s)\n"
                f"Plot           {run_dir / 'metrics.png'}\n"
                f"Metrics        {run_dir / 'metrics.csv'}\n"
                f"Checkpoint     {checkpoints.path(run_dir, self.update)}")


def prepare_run_dir(args: argparse.Namespace) -> None:
    """Rank 0 makes the folder, or empties it; the others wait. Collective.

    Raises:
        FileExistsError: on every rank, there is a run in the folder, and neither --resume nor --overwrite.
    """
    taken = not args.resume and ((args.run_dir / "metrics.csv").exists() or checkpoints.has_any(args.run_dir))
    taken = any(from_all_ranks(taken))  # every rank has looked before rank 0 changes anything
    if taken and not args.overwrite:
        raise FileExistsError(f"{args.run_dir} has a run in it: --resume goes on with it, --overwrite starts again, "
                              "--run-dir names another folder")
    if dist.get_rank() == 0:
        args.run_dir.mkdir(parents=True, exist_ok=True)
        if args.overwrite:
            shutil.rmtree(args.run_dir / checkpoints.FOLDER, ignore_errors=True)
            for name in "metrics.csv", "metrics.png":
                (args.run_dir / name).unlink(missing_ok=True)
    dist.barrier()


def main() -> None:
    args = parse_arguments()
    # DeepSpeed calls names that torch is about to rename; nothing a user of this script could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    distributed.join()
    prepare_run_dir(args)
    trainer = Trainer(args)
    if trainer.rank == 0:
        print(f"ViT {args.model} ({sum(p.numel() for p in trainer.engine.module.parameters()):,} parameters), "
              f"{len(trainer.train_images):,} training and {len(trainer.test_images):,} test images, "
              f"{trainer.world_size} x {trainer.device.type}, {args.config}", flush=True)
    code = 0
    try:
        words = trainer.run()
    except Stopped:
        code = SAVED_TO_GO_ON
        words = (f"\nStopped by {trainer.stop.caught or 'a signal'} after update {trainer.update} of "
                 f"{trainer.total_updates}; --resume goes on\n"
                 f"Checkpoint     {checkpoints.path(args.run_dir, trainer.update)}")
        trainer.stop.close()
        trainer.progress.close()
        trainer.log.close()
    if trainer.rank == 0:
        say(words)
    trainer.engine.destroy()
    distributed.leave()
    sys.exit(code)


if __name__ == "__main__":
    main()
