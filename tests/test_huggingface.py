"""Hugging Face Trainer and Accelerate train with LookSAM: to the bit what the same DeepSpeed loop, written out, gives.

That loop is compared with the oracle elsewhere. Each run is a real Trainer on real ranks; batches have different
numbers of labels, so that the Trainer's normalisation by ``num_items_in_batch`` matters.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from .ranks import RankError, run_on_ranks
from .training import master_weights

pytest.importorskip("accelerate")

VOCABULARY, LENGTH = 41, 12
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Run:
    stage: int = 2
    bf16: bool = False
    steps: int = 7
    accumulation: int = 2
    micro_batch: int = 3
    k: int = 3
    loss: str = "the model's"
    smoothing: float = 0.0
    dropout: float = 0.1
    world: int = 2
    arguments: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluations(self) -> int:
        return self.steps + -(-self.steps // self.k)

    def json(self) -> dict[str, Any]:
        """What the user's ds_config.json says: everything that can be "auto" is."""
        return {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": "auto",
                                  "stage3_prefetch_bucket_size": "auto",
                                  "stage3_param_persistence_threshold": "auto"},
            "optimizer": {"type": "LookSAM", "params": {
                "k": self.k, "rho": 0.05, "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto",
                **self.params}},
        }

    def json_filled_in(self) -> dict[str, Any]:
        """The same, with what the Trainer's arguments below say in place of "auto"."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": self.bf16},
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 16 * 16,
                                  "stage3_prefetch_bucket_size": int(0.9 * 16 * 16),
                                  "stage3_param_persistence_threshold": 10 * 16},
            "optimizer": {"type": "LookSAM", "params": {
                "k": self.k, "rho": 0.05, "lr": LEARNING_RATE, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.01,
                **self.params}},
        }


def model(run: Run) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2,
                                      resid_pdrop=run.dropout, embd_pdrop=run.dropout, attn_pdrop=run.dropout,
                                      bos_token_id=0, eos_token_id=0, use_cache=False))


def sample(i: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    tokens = torch.randint(0, VOCABULARY, (LENGTH, ), generator=generator)
    labels = tokens.clone()
    labels[:1 + i % 6] = -100  # the first one never counts: causal models shift
    return {"input_ids": tokens, "labels": labels}


DATA = [sample(i) for i in range(120)]


# What users change about the loss -------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """Has its own backward, so its result cannot be formed again from a recording."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of the user's own: the mean over labelled tokens of (1 - p)² log p."""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    log_p = F.log_softmax(logits, dim=-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    per_token = -(1 - log_p.exp())**2 * log_p
    return per_token[labels != -100].mean()


def compute_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    loss = F.cross_entropy(outputs["logits"][:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


def trainer_class(run: Run) -> type:
    from transformers import Trainer

    if run.loss not in ("focal", "unrecordable"):
        return Trainer

    class WithItsOwnLoss(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                         num_items_in_batch: Any = None) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = focal(outputs.logits, labels)
            if run.loss == "unrecordable":
                loss = Scaled.apply(loss)
            return (loss, outputs) if return_outputs else loss

        loss_is_scaled_for_ga = False

    return WithItsOwnLoss


# The two loops --------------------------------------------------------------------------------------------------------


def forget_accelerate() -> None:
    """Accelerate keeps its configuration in process-wide singletons; ranks here live longer than one run."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer(run: Run, folder: str, callbacks: Any = ()) -> Any:
    from transformers import TrainingArguments

    import ds_looksam  # noqa: F401 - the one line a script gains

    forget_accelerate()
    arguments = TrainingArguments(
        output_dir=folder, deepspeed=run.json(), max_steps=run.steps, bf16=run.bf16,
        per_device_train_batch_size=run.micro_batch, gradient_accumulation_steps=run.accumulation,
        learning_rate=LEARNING_RATE, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7, weight_decay=0.01,
        max_grad_norm=0.5, lr_scheduler_type="linear", warmup_steps=2, label_smoothing_factor=run.smoothing,
        train_sampling_strategy="sequential", report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=3,
        **{"save_strategy": "no", **run.arguments})
    extra = {"compute_loss_func": compute_loss_func} if run.loss == "function" else {}
    return trainer_class(run)(model=model(run), args=arguments, train_dataset=DATA, eval_dataset=DATA[:13],
                              callbacks=list(callbacks), **extra)


@dataclass
class Result:
    weights: dict[str, Tensor]
    evaluations: int
    history: list[dict[str, float]]
    first_rng: Tensor


def train_with_trainer(run: Run, folder: str, resume: Any = None, stop_after: int | None = None) -> Result:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == stop_after

    hf = trainer(run, folder, callbacks=[Stop()])
    random_states: list[Tensor] = []
    hf.model.register_forward_pre_hook(lambda *_: random_states.append(torch.get_rng_state()))
    hf.train(resume_from_checkpoint=resume)
    engine = hf.model_wrapped
    result = Result(master_weights(engine), engine.looksam.evaluations, hf.state.log_history, random_states[0])
    hf.accelerator.free_memory()
    return result


def train_with_own_loop(run: Run, random_states: list[Tensor]) -> tuple[dict[str, Tensor], int]:
    """The same training as a plain DeepSpeed loop; each rank's dropout starts from its ``random_states``."""
    import deepspeed
    from transformers import get_linear_schedule_with_warmup
    from transformers.trainer_pt_utils import LabelSmoother

    import ds_looksam  # noqa: F401

    rank = torch.distributed.get_rank()
    module = model(run)
    engine, _, _, _ = deepspeed.initialize(
        model=module, config=run.json_filled_in(),
        model_parameters=module.parameters(),  # the Trainer makes one group where the JSON names the optimizer
        lr_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, 2, run.steps))
    batches = [DATA[i:i + run.micro_batch] for i in range(0, len(DATA), run.micro_batch)]
    engine.train()
    torch.set_rng_state(random_states[rank])
    for update in range(run.steps):
        first = update * run.accumulation * run.world
        window = [{key: torch.stack([s[key] for s in batch]) for key in batch[0]}
                  for batch in batches[first:first + run.accumulation * run.world]]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        for batch in window[rank::run.world]:
            labels = batch["labels"]
            if run.loss == "the model's" and not run.smoothing:
                loss = engine(**batch, num_items_in_batch=items).loss * run.world
            else:
                outputs = engine(input_ids=batch["input_ids"], **(
                    {"num_items_in_batch": items} if run.loss in ("function", "the model's") else {}))
                if run.loss == "function":
                    loss = compute_loss_func(outputs, labels, items) * run.world
                elif run.smoothing:
                    loss = LabelSmoother(run.smoothing)(outputs, labels, shift_labels=True,
                                                        num_items_in_batch=items) * run.world
                else:
                    loss = focal(outputs.logits, labels) / run.accumulation
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
    result = master_weights(engine), engine.looksam.evaluations
    engine.destroy()
    return result


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), f"{name}: {(got[name] - expected[name]).abs().max():.1e}"


# The Trainer ----------------------------------------------------------------------------------------------------------

RUNS = {
    "stage 1": Run(stage=1),
    # Evaluations draw a random number for their data loader, so dropout would see other ones than in our loop.
    "stage 2, evaluation": Run(dropout=0.0, arguments={"eval_strategy": "steps", "eval_steps": 2}),
    "stage 3, evaluation": Run(stage=3, dropout=0.0, arguments={"eval_strategy": "steps", "eval_steps": 2}),
    "bf16": Run(bf16=True),
    "label smoothing": Run(smoothing=0.1),
    "compute_loss override": Run(loss="focal", stage=3),
    "compute_loss_func": Run(loss="function", accumulation=1),
    "numeric alpha": Run(stage=0, params={"alpha": 0.7}),
    "stage 1, ascent rank": Run(stage=1, bf16=True, params={"ascent": "rank"}),
    "stage 2, ascent micro_batch": Run(params={"ascent": "micro_batch"}),
}


EVERY_STAGE = {f"{name}, stage {stage}": replace(run, stage=stage)
               for name, run in RUNS.items() if "stage" not in name for stage in (1, 2, 3) if run.stage != stage}


@pytest.mark.parametrize("run", [*RUNS.values(), *(pytest.param(run, marks=pytest.mark.grid)
                                                   for run in EVERY_STAGE.values())], ids=[*RUNS, *EVERY_STAGE])
def test_trainer_equals_own_loop(run: Run, tmp_path: Any) -> None:
    results = run_on_ranks(run.world, train_with_trainer, run, str(tmp_path))
    expected = run_on_ranks(run.world, train_with_own_loop, run, [result.first_rng for result in results])
    for result, (weights, evaluations) in zip(results, expected, strict=True):
        assert result.evaluations == evaluations == run.evaluations
        assert_same(result.weights, weights)
        assert any("loss" in entry for entry in result.history)
        assert any("eval_loss" in entry for entry in result.history) == ("eval_strategy" in run.arguments)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.grid), 2, 3])
def test_a_resumed_trainer_is_the_one_that_never_stopped(stage: int, tmp_path: Any) -> None:
    run = Run(stage=stage, steps=8, dropout=0.0, arguments={"save_strategy": "steps", "save_steps": 4})
    whole = run_on_ranks(2, train_with_trainer, run, str(tmp_path / "whole"))
    stopped = run_on_ranks(2, train_with_trainer, run, str(tmp_path / "parts"), None, 4)
    resumed = run_on_ranks(2, train_with_trainer, run, str(tmp_path / "parts"), True)
    for before, result, expected in zip(stopped, resumed, whole, strict=True):
        assert before.evaluations == 4 + 2  # stopped after the second SAM step, with two reuse steps to come
        assert result.evaluations == expected.evaluations == run.evaluations
        assert_same(result.weights, expected.weights)


def train_unrecordable(run: Run, folder: str, set_loss_fn: bool) -> dict[str, Tensor]:
    from transformers import TrainerCallback

    class SetLossFn(TrainerCallback):
        """What the error message tells users to do; ``labels`` is no input of the model here, so it is kept aside."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hf.model_wrapped.loss_fn = self.loss

        @staticmethod
        def loss(outputs: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
            labels = torch.stack([LABELS_OF[tuple(tokens.tolist())] for tokens in input_ids])
            return focal(outputs.logits, labels) / run.accumulation

    hf = trainer(run, folder, [SetLossFn()] if set_loss_fn else [])
    hf.train()
    weights = master_weights(hf.model_wrapped)
    hf.accelerator.free_memory()
    return weights


LABELS_OF = {tuple(s["input_ids"].tolist()): s["labels"] for s in DATA}


def test_a_loss_that_cannot_be_formed_again_says_what_to_set_and_that_works(tmp_path: Any) -> None:
    run = Run(loss="unrecordable", world=1, steps=4, dropout=0.0)
    with pytest.raises(RankError, match=r"LookSAMReplayError(?s:.*)ScaledBackward(?s:.*)trainer.model_wrapped.loss_fn"):
        run_on_ranks(1, train_unrecordable, run, str(tmp_path), False)
    got = run_on_ranks(1, train_unrecordable, run, str(tmp_path), True)[0]
    recordable = run_on_ranks(1, train_with_trainer, replace(run, loss="focal"), str(tmp_path))[0]
    assert_same(got, recordable.weights)


# Accelerate's own loop ------------------------------------------------------------------------------------------------


def train_with_accelerate(run: Run) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim, DummyScheduler, InitProcessGroupKwargs
    from transformers import get_linear_schedule_with_warmup

    import ds_looksam  # noqa: F401

    forget_accelerate()
    config = run.json()
    del config["bf16"]
    config["gradient_clipping"] = 0.5
    # What Accelerate itself fills in is lr and weight_decay.
    config["optimizer"]["params"] |= {"betas": [0.8, 0.95], "eps": 1e-7}
    # On a machine with GPUs Accelerate finds its backend itself.
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
                              gradient_accumulation_steps=run.accumulation,
                              kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    module = model(run)
    optimizer = DummyOptim(module.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    scheduler = DummyScheduler(optimizer, lr_scheduler_callable=lambda opt: get_linear_schedule_with_warmup(
        opt, 2, run.steps))
    loader = torch.utils.data.DataLoader(DATA, batch_size=run.micro_batch)
    engine, optimizer, loader, scheduler = accelerator.prepare(module, optimizer, loader, scheduler)
    engine.train()
    for i, batch in enumerate(loader):
        if i == run.steps * run.accumulation:
            break
        with accelerator.accumulate(engine):
            loss = focal(engine(input_ids=batch["input_ids"]).logits, batch["labels"])
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    result = master_weights(engine), engine.looksam.evaluations
    accelerator.free_memory()
    return result


@pytest.mark.parametrize(("stage", "ascent"), [(1, "global"), (3, "global"), (2, "rank"), (3, "global_micro_batch")])
def test_accelerate_equals_own_loop(stage: int, ascent: str) -> None:
    # Accelerate lets DeepSpeed divide by the accumulation, our loop does it itself: exact, as it is a power of two.
    run = Run(stage=stage, loss="focal", dropout=0.0, params={"alpha": "calibrated", "ascent": ascent})
    results = run_on_ranks(2, train_with_accelerate, run)
    expected = run_on_ranks(2, train_with_own_loop, run, [torch.get_rng_state()] * 2)
    for (weights, evaluations), (own_weights, _) in zip(results, expected, strict=True):
        assert evaluations == run.evaluations
        assert_same(weights, own_weights)
