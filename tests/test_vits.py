"""launch/vits.py: the sizes are the published ones, names that make no sense are refused."""

from __future__ import annotations

import pytest
import torch
from vits import build_vit, vit_config


# Parameters in millions: DeiT table 1 (Ti 5, S 22), ViT table 1 (B 86, L 307, H 632).
@pytest.mark.parametrize(("name", "millions"),
                         [("Ti/16", 5.7), ("S/16", 22.1), ("B/16", 86.6), ("L/16", 304.3), ("H/14", 632.0)])
def test_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = build_vit(name, image_size=224, channels=3, classes=1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", ["nano/7", "micro/4", "mini/14"])
def test_small_ones_return_loss_and_logits(name):
    output = build_vit(name, image_size=28, channels=1, classes=10)(
        pixel_values=torch.randn(3, 1, 28, 28), labels=torch.tensor([0, 9, 1]))
    assert output.loss.shape == () and output.logits.shape == (3, 10)


@pytest.mark.parametrize("name", ["B16", "B/", "B/0", "XXL/16", "b/16", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="SIZE/PATCH"):
        vit_config(name, 224, 3, 1000)


def test_patches_that_do_not_tile_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match="these do: 2, 4, 7, 14, 28"):
        vit_config("S/16", 28, 1, 10)
