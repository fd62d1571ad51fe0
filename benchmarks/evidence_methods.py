"""What benchmarks/evidence.py compares, as blocks of the DeepSpeed JSON, and what is a benchmark's own: MSAM, and other
rules of reuse than alpha "auto"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence_tasks import Task
from ds_looksam.config.params import ASCENTS


@dataclass(frozen=True)
class Method:
    """One contender.

    Attributes:
        type: "base" (the task's optimizer alone), "MSAM", or a LookSAM type of the JSON.
        params: LookSAM's keys, but for rho and ascent.
        more: how many times the task's updates it gets.
        tuned_as: the method whose tuning it shares.
        every_kth: the method that differs only in that nothing is reused: SAM at every k-th step.
        reuse: another rule than alpha "auto", as keywords of :class:`ReuseRule`.
    """

    name: str
    type: str = "base"
    params: dict[str, Any] = field(default_factory=dict)
    ascent: str = "global"
    more: float = 1.0
    tuned_as: str = ""
    every_kth: str = ""
    reuse: dict[str, Any] = field(default_factory=dict)

    @property
    def has_rho(self) -> bool:
        return self.type != "base"

    def micro_batch(self, task: Task, world: int) -> int:
        return task.micro_batch if "micro_batch" in self.ascent else task.batch // world

    def examples(self, task: Task, world: int) -> int | None:
        """m, the examples that share one perturbation; None where there is none, or no gradient's."""
        if self.type in ("base", "MSAM"):
            return None
        return {"global": task.batch, "rank": task.batch // world, "micro_batch": task.micro_batch,
                "global_micro_batch": task.micro_batch * world}[self.ascent]

    def config(self, task: Task, world: int, lr: float, rho: float | None) -> dict[str, Any]:
        """The whole DeepSpeed configuration of a run."""
        own: dict[str, Any] = {"lr": lr, "weight_decay": task.weight_decay}
        if task.base == "AdamW":
            own["torch_adam"] = True  # the same on every machine, and nothing to compile
        kind = {"AdamW": "AdamW", "Lamb": "ZeroLamb"}[task.base]
        if self.type not in ("base", "MSAM"):
            kind = self.type
            own |= {"base_optimizer": task.base, "rho": rho, **self.params}
            if self.ascent != "global":
                own["ascent"] = self.ascent
        return {"train_batch_size": task.batch, "train_micro_batch_size_per_gpu": self.micro_batch(task, world),
                "gradient_clipping": 1.0, "zero_optimization": {"stage": 0}, "steps_per_print": 1_000_000_000,
                "optimizer": {"type": kind, "params": own}}


def _catalogue() -> dict[str, Method]:
    methods = [Method("base"), Method("base-x1.2", more=1.2, tuned_as="base"),
               Method("base-x2", more=2.0, tuned_as="base"), Method("MSAM", "MSAM")]
    for ascent in ASCENTS:
        end = "" if ascent == "global" else f"/{ascent}"
        methods.append(Method(f"SAM{end}", "LookSAM", {"k": 1}, ascent))
        for k in 5, 10:
            plain = f"SAM-{k}{end}"
            variants = {plain: ("LookSAM", 0.0), f"LookSAM-{k}{end}": ("LookSAM", "auto"),
                        f"LookSAM-{k}-alpha0.7{end}": ("LookSAM", 0.7), f"LookSAM-{k}-alpha0.2{end}": ("LookSAM", 0.2),
                        f"Look-LayerSAM-{k}{end}": ("LookLayerSAM", "auto")}
            methods += [Method(name, kind, {"k": k, "alpha": alpha}, ascent, every_kth="" if name == plain else plain,
                               tuned_as=name.replace("-10", "-5")) for name, (kind, alpha) in variants.items()]
        methods += [Method(f"LookSAM-5-{name}{end}", "LookSAM", {"k": 5}, ascent, tuned_as=f"LookSAM-5{end}",
                           every_kth=f"SAM-5{end}", reuse=rule) for name, rule in REUSE_RULES.items()]
    return {method.name: method for method in methods}


REUSE_RULES: dict[str, dict[str, Any]] = {"mean": {"fresh": 0.5}, "squares": {"least_squares": True},
                                          "decay0.5": {"decay": 0.5}, "decay0.95": {"decay": 0.95}}
METHODS = _catalogue()


def refusal(method: Method, task: Task, world: int) -> str | None:
    """Why a method cannot run here, or None."""
    if method.ascent == "rank" and world == 1:
        return "with one rank it is the same as global"
    if method.type == "MSAM" and task.base != "AdamW":
        return "it is written for AdamW's momentum"
    if task.batch % (method.micro_batch(task, world) * world):
        return f"batch {task.batch} is no multiple of {method.micro_batch(task, world)} x {world} ranks"
    return None


class ReuseRule:
    """Other rules than alpha "auto", put over it after each SAM step of an engine on stage 0 in fp32.

    Args:
        fresh: v becomes ``fresh`` g_v + (1 - ``fresh``) v; 1 is LookSAM's own rule.
        decay: beta <- ``decay`` beta + (1 - ``decay``) b, b = <v, g_v> / (‖v‖ ‖g‖); 0.8 is LookSAM's own.
        least_squares: beta is the c that makes the sum of ‖g_v - c ‖g‖ v / ‖v‖‖² over past SAM steps smallest, older
            ones counting less by ``decay``: sum ‖g‖ <v, g_v> / ‖v‖ over sum ‖g‖². LookSAM's own counts all b alike,
            however long the gradient was.
    """

    def __init__(self, engine: Any, fresh: float = 1.0, decay: float = 0.8, least_squares: bool = False) -> None:
        self.engine, self.fresh, self.decay, self.least_squares = engine, fresh, decay, least_squares
        self.v: list[Tensor] = []  # as it was left, where it is no g_v
        self.sums: list[Tensor] = []

    @torch.no_grad()
    def after_update(self) -> None:
        status, state = self.engine.looksam, self.engine._state
        if status.step_kind != "sam":
            return
        if status.orthogonal_cosine is not None:
            along, norm = status.orthogonal_cosine * status.orthogonal_norm, status.gradient_norm  # <v, g_v> / ‖v‖, ‖g‖
            new = [along * norm, norm**2] if self.least_squares else [along / norm, torch.ones_like(norm)]
            self.sums = [self.decay * old + (1 - self.decay) * x
                         for old, x in zip(self.sums or new, new, strict=True)]
            status.beta = self.sums[0] / self.sums[1]
        if self.fresh != 1:
            if self.v:
                state._store([self.fresh * a + (1 - self.fresh) * b for a, b in zip(state.v, self.v, strict=True)])
            self.v = [part.clone() for part in state.v]


class MomentumAscent:
    """MSAM (Becker et al. 2024, arXiv 2401.12033): the gradient is taken at w - rho m / ‖m‖, m AdamW's first moment,
    so that no second evaluation is needed. Around the windows of an engine on stage 0, whose optimizer is torch's.

    The published AdamW_MSAM adds eps back before it steps, as here; here the weights are copied back, so that
    nothing drifts and what is tested are the unperturbed ones.
    """

    def __init__(self, engine: Any, rho: float) -> None:
        self.rho, self.state = rho, engine.optimizer.state
        self.parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
        self.clean: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Before a window's first forward. In the first one there is no momentum, and nothing moves."""
        moved = [p for p in self.parameters if "exp_avg" in self.state[p]]
        if not moved:
            return
        momentum = [self.state[p]["exp_avg"] for p in moved]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(momentum)))
        self.clean = [p.clone() for p in self.parameters]
        torch._foreach_add_(moved, torch._foreach_mul(momentum, -self.rho / (norm + 1e-12)))

    @torch.no_grad()
    def end(self) -> None:
        """After its last backward, before the step."""
        if self.clean:
            torch._foreach_copy_(self.parameters, self.clean)
            self.clean = []
