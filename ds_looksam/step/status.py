"""What LookSAM has done and measured, for user code: ``engine.looksam``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

StepKind = Literal["sam", "reuse", "base", "skipped"]


@dataclass
class LookSAMStatus:
    """Counters and the measurements of the last SAM step.

    The counters are plain ints. The measurements stay on the device, as float64 0-dim tensors, until somebody reads
    them: ``.item()`` is the reader's synchronisation, never the step's. They are None until the first SAM step, and
    the same on every rank, but for ``sharpness`` on stage 0. Norms are those of the whole model's gradient, without
    the loss scale.

    Attributes:
        k: period of the SAM steps, in updates.
        updates: updates applied so far; a skipped one (overflow) does not count.
        evaluations: gradient evaluations so far, in accumulation windows: updates + SAM steps, skipped ones included.
        step_kind: what the last boundary did: "sam", "reuse", "base" (no correction was available or wanted) or
            "skipped" (DeepSpeed applied no update).
        rho: rho in force at the last boundary, one per param group.
        alpha: alpha in force at the last boundary, one per param group; None where it is "auto", then see ``beta``.
        gradient_norm: ‖g‖ of the last SAM step.
        perturbed_gradient_norm: ‖g_s‖ of the last SAM step.
        orthogonal_norm: ‖g_v‖ of the last SAM step.
        gradient_cosine: cosine of g and g_s of the last SAM step.
        perturbation_ratio: ‖Δw‖ / ‖eps‖ of the last SAM step, where Δw is by how much the weights that the model
            computes with really moved, after rounding to its dtype. ‖eps‖ is rho where all param groups share one.
            Over all groups where ``ascent`` makes several.
        perturbation_cosine: cosine of Δw and eps of the last SAM step. Both are 1 in fp32; docs/low-precision.md says
            what to make of them in bf16 and fp16.
        ascent: who shares one perturbation, the JSON key.
        first_sam_update: the update, counted from 0, of the first SAM step; the ones before are the base optimizer's.
        orthogonal_cosine: cosine of the last SAM step's g_v and the one stored before it, which the reuse steps in
            between added. None until the second SAM step.
        sharpness: loss at w + eps minus loss at w of the last SAM step's window, averaged over micro-batches and
            ranks. On ZeRO stage 0 over this rank's micro-batches: LookSAM sends nothing there that it could join (but
            for ``ascent`` "rank" and "micro_batch").
        beta: strength of the reuse under alpha "auto", None until the second SAM step has measured it.
    """

    k: int
    updates: int = 0
    evaluations: int = 0
    step_kind: StepKind = "base"
    rho: list[float] = field(default_factory=list)
    alpha: list[float | None] = field(default_factory=list)
    gradient_norm: Tensor | None = None
    perturbed_gradient_norm: Tensor | None = None
    orthogonal_norm: Tensor | None = None
    gradient_cosine: Tensor | None = None
    perturbation_ratio: Tensor | None = None
    perturbation_cosine: Tensor | None = None
    orthogonal_cosine: Tensor | None = None
    sharpness: Tensor | None = None
    beta: Tensor | None = None
    first_sam_update: int = 0
    ascent: str = "global"

    @property
    def is_off(self) -> bool:
        """Whether the window now running is one of those before LookSAM starts."""
        return self.updates < self.first_sam_update

    @property
    def next_is_sam(self) -> bool:
        """Whether the window now running ends in a SAM step."""
        return not self.is_off and (self.updates - self.first_sam_update) % self.k == 0

    @property
    def orthogonal_ratio(self) -> Tensor | None:
        """‖g_v‖ / ‖g‖ of the last SAM step."""
        if self.gradient_norm is None or self.orthogonal_norm is None:
            return None
        return self.orthogonal_norm / self.gradient_norm

    def measurements(self) -> dict[str, float]:
        """The measurements there are, by name, as floats. Waits for the device once."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)} | {"orthogonal_ratio": self.orthogonal_ratio}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        if not tensors:
            return {}
        return dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, for a log or a JSON file; measurements that are not there yet are None.
        Waits for the device once."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"orthogonal_ratio": None}
        return {**values, "rho": list(self.rho), "alpha": list(self.alpha), **self.measurements()}
