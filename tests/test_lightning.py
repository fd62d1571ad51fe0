"""PyTorch Lightning's DeepSpeed strategy trains with LookSAM: to the bit what the same loop, written out, gives.

Lightning refuses its DeepSpeed strategy on anything but CUDA. Here everything of it runs but the three places that ask
for a GPU, see ``on_cpu``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from .ranks import RankError, run_on_ranks
from .training import CLASSES, Case, engine_for, make_model, master_weights

pytest.importorskip("lightning")

def on_cpu(config: dict[str, Any]) -> Any:
    """Lightning's DeepSpeedStrategy without its checks for CUDA."""
    import deepspeed
    from lightning.pytorch.strategies import DeepSpeedStrategy

    class OnCpu(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            # Lightning's own passes the index of the GPU, which a CPU has not.
            engine, optimizer, _, _ = deepspeed.initialize(
                config=self.config, model=model, optimizer=optimizer, lr_scheduler=lr_scheduler,
                model_parameters=filter(lambda p: p.requires_grad, model.parameters()), dist_init_required=False)
            return engine, optimizer

    return OnCpu(config=config)


def train_with_lightning(case: Case, folder: str, loss_in: str, updates: int, resume: str | None = None
                         ) -> dict[str, Any]:
    """The first ``updates`` of the case, then a checkpoint in ``folder``; or from one to the end."""
    import lightning
    import torchmetrics

    import ds_looksam  # noqa: F401 - the one line a script gains

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(case.model, case.seed)
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
            self.calls = 0

        def forward(self, x: Any) -> Any:
            return self.model.body(x)

        def training_step(self, i: torch.Tensor) -> Any:
            self.calls += 1
            x, y = case.micro_batches(self.current_epoch, torch.distributed.get_rank())[int(i)]
            out = self(x.float())
            loss = F.mse_loss(out, F.one_hot(y, CLASSES).to(out.dtype))
            self.accuracy(out, y)
            self.log("accuracy", self.accuracy)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return {"loss": loss, "out": out.detach()} if loss_in == "mapping" else loss

        def configure_optimizers(self) -> None:
            """Lightning wants it to be there; the optimizer is the configuration's."""

    config = case.json()
    del config["gradient_accumulation_steps"], config["gradient_clipping"]  # Lightning insists on its own arguments
    trainer = lightning.Trainer(
        accelerator="cpu", devices=case.world, strategy=on_cpu(config), max_epochs=updates,
        accumulate_grad_batches=case.accumulation, gradient_clip_val=case.clipping, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder)
    module = Module()
    end: dict[str, Any] = {}

    class Keep(lightning.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            end["counted"] = int(module.accuracy._update_count)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            end["weights"] = {name.removeprefix("model."): w for name, w in master_weights(trainer.model).items()}
            end["evaluations"] = trainer.model.looksam.evaluations
            if updates < case.updates:
                trainer.save_checkpoint(Path(folder) / "checkpoint")

    trainer.callbacks.append(Keep())
    # An epoch is one accumulation window, so that a run can stop at the end of an epoch after any update.
    windows = torch.utils.data.DataLoader(torch.arange(case.accumulation), batch_size=None)
    trainer.fit(module, windows, ckpt_path=resume)
    assert "log" not in vars(module)
    return {**end, "calls": module.calls, "loss": trainer.callback_metrics["loss"].item()}


def train_with_own_loop(case: Case) -> tuple[dict[str, torch.Tensor], float]:
    with engine_for(case) as engine:
        for update in range(case.updates):
            losses = []
            for x, y in case.micro_batches(update, torch.distributed.get_rank()):
                loss = engine(x.float(), y)
                losses.append(loss.item())
                # Lightning divides by the accumulation, and so does DeepSpeed, with and without LookSAM.
                engine.backward(loss / case.accumulation)
                engine.step()
        return master_weights(engine), sum(losses) / len(losses)


@pytest.mark.parametrize(("stage", "loss_in", "stop"), [(1, "tensor", 7), (2, "mapping", 5), (3, "tensor", 7)])
def test_lightning_equals_own_loop(stage: int, loss_in: str, stop: int, tmp_path: Path) -> None:
    """Also where it stops after five updates and is resumed."""
    case = Case(stage=stage, accumulation=2, updates=7, k=3, clipping=0.05)
    results = run_on_ranks(2, train_with_lightning, case, str(tmp_path), loss_in, stop)
    if stop < case.updates:
        results = run_on_ranks(2, train_with_lightning, case, str(tmp_path), loss_in, case.updates,
                               str(tmp_path / "checkpoint"))
    for result, (weights, mean_loss) in zip(results, run_on_ranks(2, train_with_own_loop, case), strict=True):
        assert result["evaluations"] == case.updates + 3
        # An attribute of the module: put back. (Lightning's checkpoint does not have it.)
        assert result["calls"] == (case.updates - stop or case.updates) * case.accumulation
        assert all(torch.equal(result["weights"][name], weight) for name, weight in weights.items())
        # The last update is a SAM step: its second evaluation counts neither in what is logged nor in metrics.
        assert result["counted"] == case.accumulation
        assert result["loss"] == pytest.approx(mean_loss, rel=1e-6)


def optimize_manually() -> None:
    import lightning
    from torch import nn

    import ds_looksam  # noqa: F401

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = nn.Linear(3, 1), False

        def training_step(self, x: Any) -> None:
            self.manual_backward(self.model(x).square().mean())
            self.optimizers().step()

        def configure_optimizers(self) -> None:
            """The optimizer is the configuration's."""

    config = Case(world=1).json()
    del config["gradient_accumulation_steps"], config["gradient_clipping"]
    lightning.Trainer(accelerator="cpu", devices=1, strategy=on_cpu(config), max_epochs=1, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False).fit(
        Module(), torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4))


def test_manual_optimization_is_refused_by_name() -> None:
    """There ``training_step``, which is the engine's forward, runs backward and step itself."""
    with pytest.raises(RankError, match=r"LookSAMReplayError.*inside the model's own forward.*automatic optimization"):
        run_on_ranks(1, optimize_manually)


def test_metrics_are_as_before_whatever_kind_of_state_they_have() -> None:
    import torchmetrics

    from ds_looksam.replay.module_state import Isolation

    accuracy, mean = torchmetrics.Accuracy("multiclass", num_classes=CLASSES), torchmetrics.CatMetric()
    scores, labels = torch.eye(CLASSES), torch.arange(CLASSES)
    accuracy(scores, labels)
    mean.update(torch.tensor([1.0]))
    with Isolation(list).second_evaluation(torch.nn.ModuleList([accuracy, mean]), before=None):
        accuracy(scores, labels.flip(0))
        mean.update(torch.tensor([2.0]))
    assert accuracy.compute() == 1
    assert mean.compute() == 1 and mean._update_count == 1
