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
from torch.utils.data import DataLoader

from .ranks import RankError, run_on_ranks
from .training import master_weights

pytest.importorskip("accelerate")

VOCABULARY, LENGTH, MICRO_BATCH = 41, 12, 3
LEARNING_RATE, SMOOTHING = 1e-2, 0.1


@dataclass(frozen=True)
class Run:
    """``loss``: see :func:`own_loss`; "unrecordable" is "focal" in a form that no recording can form again."""

    stage: int = 2
    bf16: bool = False
    steps: int = 7
    accumulation: int = 2
    k: int = 3
    loss: str = "the model's"
    dropout: float = 0.1
    world: int = 2
    arguments: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluations(self) -> int:
        return self.steps + -(-self.steps // self.k)

    def json(self, filled_in: bool = False) -> dict[str, Any]:
        """What the user's ds_config.json says: everything that can be "auto" is, or ``filled_in`` with what the
        Trainer's arguments say."""

        def auto(value: Any) -> Any:
            return value if filled_in else "auto"

        return {
            "train_batch_size": auto(MICRO_BATCH * self.accumulation * self.world),
            "train_micro_batch_size_per_gpu": auto(MICRO_BATCH),
            "gradient_accumulation_steps": auto(self.accumulation),
            "gradient_clipping": auto(0.5),
            "bf16": {"enabled": auto(self.bf16)},
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": auto(16 * 16),
                                  "stage3_prefetch_bucket_size": auto(int(0.9 * 16 * 16)),
                                  "stage3_param_persistence_threshold": auto(10 * 16)},
            "optimizer": {"type": "LookSAM", "params": {
                "k": self.k, "rho": 0.05, "lr": auto(LEARNING_RATE), "betas": auto([0.8, 0.95]), "eps": auto(1e-7),
                "weight_decay": auto(0.01), **self.params}},
        }


def model(run: Run) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2,
                                      resid_pdrop=run.dropout, embd_pdrop=run.dropout, attn_pdrop=run.dropout,
                                      bos_token_id=0, eos_token_id=0, use_cache=False))


def sample(i: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (LENGTH, ), generator=torch.Generator().manual_seed(i))
    labels = tokens.clone()
    labels[:1 + i % 6] = -100  # the first one never counts: causal models shift
    return {"input_ids": tokens, "labels": labels}


DATA = [sample(i) for i in range(120)]
LABELS_OF = {tuple(s["input_ids"].tolist()): s["labels"] for s in DATA}

# The losses -----------------------------------------------------------------------------------------------------------


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
    return (-(1 - log_p.exp())**2 * log_p)[labels != -100].mean()


def own_loss(run: Run, engine: Any, batch: dict[str, Tensor], items: Tensor) -> Tensor:
    """What the Trainer makes of each, written out."""
    from transformers.trainer_pt_utils import LabelSmoother

    if run.loss == "the model's":
        return engine(**batch, num_items_in_batch=items).loss * run.world
    outputs, labels = engine(input_ids=batch["input_ids"]), batch["labels"]
    if run.loss == "label smoothing":
        return run.world * LabelSmoother(SMOOTHING)(outputs, labels, shift_labels=True, num_items_in_batch=items)
    return focal(outputs.logits, labels) / run.accumulation


# The two loops --------------------------------------------------------------------------------------------------------


def forget_accelerate() -> None:
    """Accelerate keeps its configuration in process-wide singletons; ranks here live longer than one run."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class Result:
    weights: dict[str, Tensor]
    evaluations: int
    history: list[dict[str, float]]
    first_rng: Tensor


def train_with_trainer(run: Run, folder: str, resume: bool | None = None, stop_after: int | None = None,
                       set_loss_fn: bool = False) -> Result:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import ds_looksam  # noqa: F401 - the one line a script gains

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if set_loss_fn:  # what the error message tells users to do
                hf.model_wrapped.loss_fn = self.loss

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == stop_after

        @staticmethod
        def loss(outputs: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
            """``labels`` is no input of the model here, so it is kept aside."""
            labels = torch.stack([LABELS_OF[tuple(tokens.tolist())] for tokens in input_ids])
            return focal(outputs.logits, labels) / run.accumulation

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

    forget_accelerate()
    arguments = TrainingArguments(
        output_dir=folder, deepspeed=run.json(), max_steps=run.steps, bf16=run.bf16,
        per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=run.accumulation,
        learning_rate=LEARNING_RATE, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7, weight_decay=0.01,
        max_grad_norm=0.5, lr_scheduler_type="linear", warmup_steps=2, train_sampling_strategy="sequential",
        label_smoothing_factor=SMOOTHING if run.loss == "label smoothing" else 0.0, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=3, **{"save_strategy": "no", **run.arguments})
    hf = (WithItsOwnLoss if run.loss in ("focal", "unrecordable") else Trainer)(
        model=model(run), args=arguments, train_dataset=DATA, eval_dataset=DATA[:13], callbacks=[Callback()])
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

    import ds_looksam  # noqa: F401

    rank = torch.distributed.get_rank()
    module = model(run)
    engine, _, _, _ = deepspeed.initialize(
        model=module, config=run.json(filled_in=True),
        model_parameters=module.parameters(),  # the Trainer makes one group where the JSON names the optimizer
        lr_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, 2, run.steps))
    batches = list(DataLoader(DATA, MICRO_BATCH))
    engine.train()
    torch.set_rng_state(random_states[rank])
    for update in range(run.steps):
        first = update * run.accumulation * run.world
        window = batches[first:first + run.accumulation * run.world]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        for batch in window[rank::run.world]:
            engine.backward(own_loss(run, engine, batch, items), scale_wrt_gas=False)
            engine.step()
    result = master_weights(engine), engine.looksam.evaluations
    engine.destroy()
    return result


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), f"{name}: {(got[name] - expected[name]).abs().max():.1e}"


# The Trainer ----------------------------------------------------------------------------------------------------------

# Evaluations draw a random number for their data loader, so dropout would see other ones than in our loop.
EVALUATING = Run(dropout=0.0, arguments={"eval_strategy": "steps", "eval_steps": 2})
RUNS = {
    "stage 0, numeric alpha": Run(stage=0, loss="label smoothing", accumulation=1, params={"alpha": 0.7}),
    "stage 1, ascent rank, bf16": Run(stage=1, bf16=True, params={"ascent": "rank"}),
    "label smoothing, evaluation": replace(EVALUATING, loss="label smoothing"),
    "bf16": Run(bf16=True),
    "stage 2, ascent micro_batch": Run(params={"ascent": "micro_batch"}),
    "stage 3, evaluation": replace(EVALUATING, stage=3),
    "compute_loss override": Run(loss="focal", stage=3),
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


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.grid) for stage in (1, 3))])
def test_a_resumed_trainer_is_the_one_that_never_stopped(stage: int, tmp_path: Any) -> None:
    """Stopped after the second SAM step, with two reuse steps to come. On stages 2 and 3 test_peft.py does it too."""
    run = Run(stage=stage, steps=8, dropout=0.0, arguments={"save_strategy": "steps", "save_steps": 4})
    whole = run_on_ranks(2, train_with_trainer, run, str(tmp_path / "whole"))
    stopped = run_on_ranks(2, train_with_trainer, run, str(tmp_path / "parts"), None, 4)
    resumed = run_on_ranks(2, train_with_trainer, run, str(tmp_path / "parts"), True)
    for before, result, expected in zip(stopped, resumed, whole, strict=True):
        assert before.evaluations == 4 + 2
        assert result.evaluations == expected.evaluations == run.evaluations
        assert_same(result.weights, expected.weights)


def test_a_loss_that_cannot_be_formed_again_says_what_to_set_and_that_works(tmp_path: Any) -> None:
    run = Run(loss="unrecordable", world=1, steps=4, dropout=0.0)
    with pytest.raises(RankError, match=r"LookSAMReplayError(?s:.*)ScaledBackward(?s:.*)trainer.model_wrapped.loss_fn"):
        run_on_ranks(1, train_with_trainer, run, str(tmp_path))
    [got] = run_on_ranks(1, train_with_trainer, run, str(tmp_path), None, None, True)
    [(weights, _)] = run_on_ranks(1, train_with_own_loop, replace(run, loss="focal"), [got.first_rng])
    assert_same(got.weights, weights)


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
    engine, optimizer, loader, scheduler = accelerator.prepare(module, optimizer, DataLoader(DATA, MICRO_BATCH),
                                                               scheduler)
    engine.train()
    for _, batch in zip(range(run.steps * run.accumulation), loader, strict=False):
        with accelerator.accumulate(engine):
            accelerator.backward(focal(engine(input_ids=batch["input_ids"]).logits, batch["labels"]))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    result = master_weights(engine), engine.looksam.evaluations
    accelerator.free_memory()
    return result


@pytest.mark.parametrize(("stage", "ascent"), [(1, "global"), (2, "rank"), (3, "global_micro_batch")])
def test_accelerate_equals_own_loop(stage: int, ascent: str) -> None:
    # Accelerate lets DeepSpeed divide by the accumulation, our loop does it itself: exact, as it is a power of two.
    run = Run(stage=stage, loss="focal", dropout=0.0, params={"alpha": "calibrated", "ascent": ascent})
    results = run_on_ranks(2, train_with_accelerate, run)
    expected = run_on_ranks(2, train_with_own_loop, run, [torch.get_rng_state()] * 2)
    for (weights, evaluations), (own_weights, _) in zip(results, expected, strict=True):
        assert evaluations == run.evaluations
        assert_same(weights, own_weights)
