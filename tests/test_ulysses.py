"""Ulysses sequence parallelism: two sequences at a time on four ranks, each sequence on two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import oracle
from .models import FEATURES
from .ranks import run_on_ranks
from .test_options import OFFLOAD, OFFLOADED
from .training import TOLERANCE, Case, distance, engine_for, master_weights, named

WORLD, SEQUENCE_RANKS = 4, 2
LENGTH, HEADS, WIDTH = 6, 2, 8
VOCABULARY = 17
# SGD, which does not hide how long the gradient is; nor does a softmax's flat direction, where it is rounding, decide.
CASE = Case(world=WORLD, accumulation=2, alpha=0.7, updates=7, micro_batch=3, base="SGD")
TIMES = {3: 1 / SEQUENCE_RANKS}
"""What DeepSpeed 0.19.8 makes of the gradient, by ZeRO stage: it adds up over the ranks of a sequence, but where stage
3 scatters the gradient it averages over them too."""


def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """[batch, length, heads, width of a head] each."""
    scores = torch.einsum("bihc,bjhc->bhij", q, k) / (WIDTH // HEADS)**0.5
    return torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v)


class Attention(nn.Module):
    """One layer of self-attention, and this rank's part of the mean squared error over the whole sequence: DeepSpeed
    adds gradients up over the ranks of a sequence, and averages over sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(FEATURES, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, FEATURES)
        self.attend: Any = attend
        self.times = 1.0

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        dtype = self.out.weight.dtype
        target = torch.roll(x, 1, dims=1).tanh()[:, positions].to(dtype)
        q, k, v = self.into(x[:, positions].to(dtype)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        error = self.out(self.attend(q, k, v, 0).flatten(2)) - target
        return self.times * error.square().sum() / (len(x) * LENGTH * FEATURES)

    @staticmethod
    def draw(generator: torch.Generator) -> Tensor:
        return torch.randn(CASE.micro_batch, LENGTH, FEATURES, generator=generator, dtype=torch.float64)

    def parallel(self) -> Any:
        """What DeepSpeed's documentation has a user write; the mpu."""
        import deepspeed.runtime.sequence_parallel.parallel_state_sp as mpu
        from deepspeed.sequence.layer import DistributedAttention

        if mpu._SEQUENCE_PARALLEL_GROUP is None:  # it lives as long as the process
            mpu.initialize_sequence_parallel(SEQUENCE_RANKS)
        self.attend = DistributedAttention(attend, mpu.get_sequence_parallel_group(), scatter_idx=2, gather_idx=1)
        return mpu


class Llama(nn.Module):
    """As Hugging Face models get it. This rank's part of the mean loss over the tokens of whole sequences."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.times = 1.0
        torch.manual_seed(0)
        self.llama = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH, attn_implementation="sdpa", use_cache=False))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        ids = positions.expand(len(tokens), -1)
        logits = self.llama(input_ids=tokens[:, positions], position_ids=ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, positions + 1].flatten(), reduction="sum")
        return self.times * loss / (len(tokens) * LENGTH)

    @staticmethod
    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(0, VOCABULARY, (CASE.micro_batch, LENGTH + 1), generator=generator)

    def parallel(self) -> Any:
        import deepspeed.runtime.sequence_parallel.parallel_state_sp as parallel_state
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        parallel_state._release_sequence_parallel_groups()  # of another test in this process
        return UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=self.llama, core_attn_implementation="sdpa", sequence_parallel_size=SEQUENCE_RANKS,
            micro_batch_size=CASE.micro_batch, seq_length=LENGTH, seq_length_is_variable=False)


Make = Callable[[], Any]
Inputs = Callable[[int], list[tuple[Tensor, Tensor]]]


def micro_batches(make: Make, update: int, replica: int, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(make.draw(torch.Generator().manual_seed(1000 * update + 10 * replica + i)), positions)
            for i in range(CASE.accumulation)]


@contextmanager
def engine_on_parts(case: Case, make: Make) -> Iterator[tuple[Any, Inputs]]:
    """The engine, and this rank's micro-batches of an update: which sequences it works on, and which part of each."""
    from deepspeed.utils import groups

    attention_functions: Any = {}
    if make is Llama:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention_functions
    plain = attention_functions.get("sdpa")
    replica, part = divmod(torch.distributed.get_rank(), SEQUENCE_RANKS)
    here = torch.arange(LENGTH).chunk(SEQUENCE_RANKS)[part]
    module = make()
    try:
        with engine_for(case, module=module, mpu=module.parallel()) as engine:
            yield engine, lambda update: micro_batches(make, update, replica, here)
    finally:
        groups.mpu = None
        attention_functions["sdpa"] = plain


def train(case: Case, make: Make = Attention, folder: str | None = None, loss_fn: bool | None = None
          ) -> dict[str, Tensor] | str:
    """The weights, or what LookSAM refuses.

    Args:
        folder: for a stop after four updates, to go on in another engine.
        loss_fn: the loss of the whole sequence is formed on each rank, by a collective outside the model, as in
            DeepSpeed's tutorial (with all_gather there, whose backward torch does not have for gloo's groups); and
            whether LookSAM is told of it.
    """
    import torch.distributed.nn.functional as differentiable

    from ds_looksam import LookSAMReplayError

    def whole(part_of_loss: Tensor, *inputs: Tensor) -> Tensor:
        return differentiable.all_reduce(part_of_loss, group=engine.get_sequence_parallel_group())

    for first, last in pairwise([0, 4, case.updates] if folder else [0, case.updates]):
        with engine_on_parts(case, make) as (engine, inputs):
            engine.loss_fn = whole if loss_fn else None
            if first:
                engine.load_checkpoint(folder)
            for update in range(first, last):
                for micro_batch in inputs(update):
                    loss = engine(*micro_batch)
                    engine.backward(loss if loss_fn is None else whole(loss))
                    try:
                        engine.step()
                    except LookSAMReplayError as error:
                        return str(error)
            if folder:
                engine.save_checkpoint(folder)
            weights = master_weights(engine)
    return weights


def by_oracle(case: Case, times: float, make: Make = Attention) -> dict[str, Tensor]:
    module = make()
    module.times = times
    parameters = case.oracle_groups(module)
    reference = oracle.build(module, parameters, base=case.base, k=case.k, clipping=case.clipping)
    for update in range(case.updates):
        reference.update([micro_batch for replica in range(WORLD // SEQUENCE_RANKS)
                          for micro_batch in micro_batches(make, update, replica, torch.arange(LENGTH))])
    assert not case.clipping or 0 < reference.clipped < case.updates, "clipping was meant to bind now and then"
    return named(reference.w, module, parameters)


@pytest.mark.parametrize("make, stage, zero", [
    (Attention, 0, {}), (Attention, 2, {}), (Attention, 3, {}), (Attention, 2, OFFLOAD), (Llama, 2, {}),
    *(pytest.param(*rest, marks=pytest.mark.grid) for rest in [
        (Attention, 1, {}), (Attention, 3, OFFLOAD), (Llama, 1, {}), (Llama, 3, {})])])
def test_ulysses(make: Make, stage: int, zero: dict[str, Any]) -> None:
    times = TIMES.get(stage, 1.0)
    case = replace(CASE, stage=stage, zero=zero, clipping=0.2 * times if make is Attention else 0.0)
    expected = by_oracle(case, times, make)
    for got in run_on_ranks(WORLD, train, case, make):
        assert distance(got, expected) <= (OFFLOADED if zero else 1) * TOLERANCE


def test_loss_added_up_outside_the_model() -> None:
    """The backward of that collective adds up as well, so the gradient is that of the loss times SEQUENCE_RANKS."""
    case = replace(CASE, clipping=0.2 * SEQUENCE_RANKS)
    expected = by_oracle(case, times=SEQUENCE_RANKS)
    for got in run_on_ranks(WORLD, train, case, Attention, None, True):
        assert distance(got, expected) <= TOLERANCE
    for message in run_on_ranks(WORLD, train, CASE, Attention, None, False):
        assert "engine.loss_fn" in message and "_AllReduceBackward" in message


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    stopped = run_on_ranks(WORLD, train, CASE, Attention, str(tmp_path))
    for got, expected in zip(stopped, run_on_ranks(WORLD, train, CASE), strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)
