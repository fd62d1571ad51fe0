"""What the perturbation comes to after rounding, as LookSAM reports it, against what a forward hook sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .ranks import run_on_ranks
from .training import Case, engine_for, train_window

K = 2


def seen_and_reported(case: Case) -> list[tuple[float, float, float, float]]:
    """For every SAM step (ratio seen, cosine seen, ratio reported, cosine reported). Collective.

    The hook copies the weights of both evaluations; g is DeepSpeed's own account of the averaged gradient before the
    step, so eps = rho g / ‖g‖ shares nothing with the package.
    """
    from deepspeed.utils import safe_get_full_grad

    rows, seen = [], []
    with engine_for(case) as engine:
        parameters = [p for p in engine.module.parameters() if p.requires_grad]
        engine.module.register_forward_pre_hook(lambda *_: seen.append(_flat(parameters)))
        for update in range(case.updates):
            seen.clear()
            (x, y), = case.micro_batches(update, torch.distributed.get_rank())
            dtype = next(engine.module.parameters()).dtype
            engine.backward(engine(x.to(dtype), y))
            gradients = [p.grad if case.stage == 0 else safe_get_full_grad(p) for p in parameters]
            g = torch.cat([(torch.zeros_like(p) if grad is None else grad).double().reshape(-1)
                           for p, grad in zip(parameters, gradients, strict=True)])
            engine.step()
            if engine.looksam.step_kind == "sam":
                clean, perturbed = seen
                moved, eps = perturbed - clean, case.rho * g / g.norm()
                status = engine.looksam
                for reported in (status.perturbation_ratio, status.perturbation_cosine):
                    assert reported.dtype == torch.float64 and reported.dim() == 0
                rows.append((float(moved.norm() / case.rho), float(moved @ eps / (moved.norm() * eps.norm())),
                             status.perturbation_ratio.item(), status.perturbation_cosine.item()))
    return rows


def _flat(parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in parameters])


@pytest.mark.parametrize("case", [
    Case(k=K, updates=5, stage=stage, precision=precision, world=2, model="straddling", rho=rho, loss_scale=128.0,
         config={"data_types": {"grad_accum_dtype": "fp32"}} if wrapper == "BF16_Optimizer" else {})
    for stage, precision, rho, wrapper in [
        (0, "fp32", 0.1, ""), (2, "fp32", 0.1, ""), (0, "bf16", 0.02, ""), (1, "bf16", 0.02, ""),
        (2, "fp16", 0.005, ""), (1, "bf16", 0.02, "BF16_Optimizer"),
    ]
], ids=lambda c: f"{c.precision}-stage{c.stage}-{[*c.config]}")
def test_reported_is_what_the_model_saw(case: Case) -> None:
    for rank, rows in enumerate(run_on_ranks(case.world, seen_and_reported, case)):
        assert len(rows) == 3
        # At stage 0 the model lags behind its optimizer until the first update (shards/fp16.py): nothing to compare.
        for seen_ratio, seen_cosine, ratio, cosine in rows[1:] if case.stage == 0 else rows:
            # Sums of fp32 dot products over some 700 elements: 1e-6 leaves room. The gradient DeepSpeed shows in fp16
            # carries no further rounding.
            assert ratio == pytest.approx(seen_ratio, rel=1e-5) and cosine == pytest.approx(seen_cosine, rel=1e-5), rank
            if case.precision == "fp32":
                assert ratio == pytest.approx(1, abs=1e-5) and cosine == pytest.approx(1, abs=1e-5)
            else:
                assert cosine < 0.99, "rho was meant to be so small that rounding shows"


def perturbation_off(case: Case) -> tuple[float, float]:
    with engine_for(case) as engine:
        train_window(engine, case, 0)
        return engine.looksam.perturbation_ratio.item(), engine.looksam.perturbation_cosine.item()


def test_no_perturbation_is_no_deviation() -> None:
    assert run_on_ranks(1, perturbation_off, Case(world=1, rho=0.0, precision="bf16")) == [(1.0, 1.0)]
