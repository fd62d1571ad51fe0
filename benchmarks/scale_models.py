"""The models whose scaling is measured (:mod:`benchmarks.scale`) and predicted (:mod:`benchmarks.cluster_model`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MODELING = ("transformers.models.gpt2.modeling_gpt2", "transformers.models.vit.modeling_vit")
"""What to import before processes fork."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """``skeleton`` makes the module on the current default device; ``batch`` is one small micro-batch for a CPU.

    ``tokens``, ``layers`` and ``hidden`` are those of a training sample, for its FLOPs.
    """

    skeleton: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    tokens: int
    layers: int
    hidden: int

    def build(self) -> nn.Module:
        """In bf16, the type it will be trained in, with weights that are quickly made: the usual initialisation of 1.3
        billion takes minutes and, in fp32, twice the memory."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            module: Any = self._on_meta()
        finally:
            torch.set_default_dtype(default)
        module.to_empty(device="cpu")
        if hasattr(module, "tie_weights"):
            module.tie_weights()
        noise = (0.02 * torch.randn(1 << 16)).bfloat16()
        with torch.no_grad():
            for p in module.parameters():
                for piece in p.view(-1).split(noise.numel()):
                    piece.copy_(noise[:piece.numel()] if p.dim() > 1 else torch.ones_like(piece))
        return module

    def sizes(self) -> tuple[list[int], list[int]]:
        """Elements of each parameter tensor; and of each use of one, where modules share some."""
        module = self._on_meta()
        return ([p.numel() for p in module.parameters()],
                [p.numel() for _, p in module.named_parameters(remove_duplicate=False)])

    def forward_flops(self) -> float:
        """Of one sample: two for every weight and token, and the products of the attention."""
        return 2 * sum(self.sizes()[0]) * self.tokens + 4 * self.layers * self.tokens**2 * self.hidden

    def _on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.skeleton()


def vit(name: str, image: int, channels: int, classes: int) -> Model:
    from vits import build_vit, vit_config

    config: Any = vit_config(name, image, channels, classes)
    return Model(skeleton=lambda: build_vit(name, image, channels, classes),
                 batch=lambda: {"pixel_values": torch.randn(1, channels, image, image).bfloat16(),
                                "labels": torch.zeros(1, dtype=torch.long)},
                 tokens=(image // config.patch_size)**2 + 1, layers=config.num_hidden_layers, hidden=config.hidden_size)


def gpt(**config: Any) -> Model:
    def skeleton() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel, logging

        logging.set_verbosity_error()
        return GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **config))

    def batch() -> Batch:
        tokens = torch.arange(8)[None] * 37 % config["vocab_size"]
        return {"input_ids": tokens, "labels": tokens}

    return Model(skeleton, batch, config["n_positions"], config["n_layer"], config["n_embd"])


GPTS: dict[str, Callable[[], Model]] = {
    # GPT-3 XL's shape (Brown et al. 2020, table 2.1).
    "gpt-1.3b": lambda: gpt(n_embd=2048, n_layer=24, n_head=16, n_positions=2048, vocab_size=50257),
    # For tests: sizes that no world size divides, one tensor above DeepSpeed's default
    # "stage3_param_persistence_threshold" and used twice, the others below.
    "tiny": lambda: gpt(n_embd=36, n_layer=1, n_head=2, n_positions=8, vocab_size=3001),
}
MODELS = {"vit-b16": lambda: vit("B/16", 224, 3, 1000), **GPTS}
