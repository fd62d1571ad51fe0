"""Vision Transformers by name, built from a config and randomly initialised: nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

from transformers import ViTConfig, ViTForImageClassification


class Size(NamedTuple):
    hidden: int
    layers: int
    heads: int
    mlp: int


SIZES = {
    # For 28x28 images, ours.
    "nano": Size(64, 4, 4, 128),
    "micro": Size(128, 6, 4, 256),
    "mini": Size(192, 6, 6, 768),
    # DeiT (Touvron et al. 2021, table 1) and ViT (Dosovitskiy et al. 2021, table 1).
    "Ti": Size(192, 12, 3, 768),
    "S": Size(384, 12, 6, 1536),
    "B": Size(768, 12, 12, 3072),
    "L": Size(1024, 24, 16, 4096),
    "H": Size(1280, 32, 16, 5120),
}


def vit_config(name: str, image_size: int, channels: int, classes: int, dropout: float = 0.0) -> ViTConfig:
    """The configuration of the ViT called ``SIZE/PATCH``: S/32, B/16, nano/7, ...

    Raises:
        ValueError: no such size, or the patch does not divide the image.
    """
    size_name, _, patch = name.partition("/")
    if size_name not in SIZES or not patch.isdecimal() or int(patch) == 0:
        raise ValueError(f"unknown model {name!r}: it is SIZE/PATCH, as in B/16, with SIZE one of {', '.join(SIZES)}")
    if image_size % int(patch):
        fitting = [str(p) for p in range(2, image_size + 1) if image_size % p == 0]
        raise ValueError(f"model {name!r}: patches of {patch} do not tile images of {image_size}x{image_size} pixels; "
                         f"these do: {', '.join(fitting)}")
    size = SIZES[size_name]
    config = ViTConfig(hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
                       intermediate_size=size.mlp, image_size=image_size, patch_size=int(patch), num_channels=channels,
                       hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    config.num_labels = classes
    return config


def build_vit(name: str, image_size: int, channels: int, classes: int,
              dropout: float = 0.0) -> ViTForImageClassification:
    """The model of :func:`vit_config`: pixel values [B, channels, image_size, image_size] and labels [B] in, an output
    with ``loss`` and ``logits`` [B, classes] out."""
    return ViTForImageClassification(vit_config(name, image_size, channels, classes, dropout))
