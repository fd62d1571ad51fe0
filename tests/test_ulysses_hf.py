"""Ulysses as Hugging Face models get it: UlyssesSPAttentionHF.register_with_transformers, against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import oracle
from .ranks import run_on_ranks
from .test_oracle_grid import TOLERANCE
from .test_ulysses import TIMES
from .training import Case, distance, engine_for, master_weights, named

pytest.importorskip("transformers")

WORLD, SEQUENCE_RANKS = 4, 2
LENGTH, VOCABULARY = 8, 17
# SGD: with Adam the softmax's flat direction, in which the gradient is rounding, would decide.
CASE = Case(world=WORLD, accumulation=2, alpha=0.7, updates=4, micro_batch=2, base="SGD")


class Llama(nn.Module):
    """This rank's part of the mean loss over the tokens of whole sequences, times ``times``."""

    def __init__(self, times: float = 1.0) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.times = times
        torch.manual_seed(0)
        self.llama = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH, attn_implementation="sdpa", use_cache=False))

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        logits = self.llama(input_ids=tokens, position_ids=positions).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (len(tokens) * LENGTH)
        return self.times * loss


def sequences(update: int, replica: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * update + 10 * replica + i)
    tokens = torch.randint(0, VOCABULARY, (CASE.micro_batch, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.arange(LENGTH).expand(CASE.micro_batch, -1)


def train(case: Case) -> dict[str, Tensor]:
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as parallel_state
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    parallel_state._release_sequence_parallel_groups()  # of another test in this process
    plain_attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = Llama()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=module.llama, core_attn_implementation="sdpa", sequence_parallel_size=SEQUENCE_RANKS,
        micro_batch_size=case.micro_batch, seq_length=LENGTH, seq_length_is_variable=False)
    replica, part = divmod(torch.distributed.get_rank(), SEQUENCE_RANKS)
    here = slice(part * LENGTH // SEQUENCE_RANKS, (part + 1) * LENGTH // SEQUENCE_RANKS)
    try:
        with engine_for(case, module=module, mpu=mpu) as engine:
            for update in range(case.updates):
                for i in range(case.accumulation):
                    engine.backward(engine(*(t[:, here] for t in sequences(update, replica, i))))
                    engine.step()
            return master_weights(engine)
    finally:
        groups.mpu = None
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain_attention


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.grid), 2, pytest.param(3, marks=pytest.mark.grid)])
def test_llama(stage: int) -> None:
    case = replace(CASE, stage=stage)
    module = Llama(TIMES.get(stage, 1.0))
    parameters = case.oracle_groups(module)
    reference = oracle.build(module, parameters, base=case.base, k=case.k)
    for update in range(case.updates):
        reference.update([sequences(update, replica, i) for replica in range(WORLD // SEQUENCE_RANKS)
                          for i in range(case.accumulation)])
    expected = named(reference.w, module, parameters)
    for got in run_on_ranks(WORLD, train, case):
        assert distance(got, expected) <= TOLERANCE
