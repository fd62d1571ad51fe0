"""The operations between the model's loss and the loss given to backward, read off the autograd graph."""

from __future__ import annotations

import pytest
import torch

from ds_looksam.replay.loss_path import UnknownLoss, follow, mark, trace


def times_three_in_place(loss):
    loss *= 3  # what the Hugging Face Trainer does with the number of processes
    return loss


SCALED = {
    "itself": lambda loss: loss,
    "divided": lambda loss: loss / 4,
    "times a tensor": lambda loss: torch.tensor(0.3) * loss,
    "in place": times_three_in_place,
    "summed, negated, cast": lambda loss: -(loss.double().sum()) / torch.tensor(7),
    "mean of one element": lambda loss: loss.reshape(1).mean(),
}


@pytest.mark.parametrize("scale", SCALED.values(), ids=SCALED.keys())
def test_constants_are_applied_again(scale):
    w = torch.tensor([0.5, -2.0], requires_grad=True)
    first = (w * w).sum()
    mark({"loss": first}, "record")
    record, path = trace(scale(first))
    assert record == "record"
    again = (w * w).sum() * 5
    expected = scale((w * w).sum() * 5)
    assert torch.equal(follow(path, again), expected)


@pytest.mark.parametrize("loss", [lambda out: out["loss"] + out["logits"].sum(), lambda out: out["logits"].sum(),
                                  lambda out: out["loss"] * out["loss"], lambda out: 1 / out["loss"]])
def test_other_losses_are_told_apart(loss):
    w = torch.tensor([0.5, -2.0], requires_grad=True)
    output = {"loss": (w * w).sum(), "logits": w * 2}
    mark(output, "record")
    with pytest.raises(UnknownLoss):
        trace(loss(output))
