"""One case of ``verify``: trains a small model, and compares it with the algorithm written down plainly."""

from __future__ import annotations

import functools
import gc
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config.base_optimizers import base_class, deepspeed_name
from ..config.params import LookSAMConfig, parse_params
from ..config.rounding import DTYPES
from ..ranks.agree import from_all_ranks
from ..reference import Loss, Reference
from ..shards.untrained import is_partitioned

RIGHT, WRONG, SKIPPED, FAILED = "right", "WRONG", "skipped", "FAILED"
ROUNDING_FP32 = 1e-4
"""In units of how far the weights moved. fp32 leaves some 1e-6, and DeepSpeed's CPU Adam, which keeps 1 - beta2^t as a
float, 1.3e-5. A rho that is 1 % off leaves 1e-3."""
MARGIN = 8.0
"""In bf16 and fp16: so many times as far from the reference as that gets from itself when it computes gradients in this
precision instead of in float64. A run rounds in more places (over micro-batches and ranks), but not in so many."""
SCALARS = 256
"""Bytes: what counts as an all-reduce of scalars."""
LOSS_SCALE = 128.0
HYPER = ("lr", "betas", "eps", "weight_decay", "momentum")
"""What schedulers change, and what DeepSpeed's optimizers and torch's have other defaults of (Adam's weight decay)."""
FEATURES, TARGETS = 7, 3


@dataclass(frozen=True)
class Case:
    """``config``: the JSON. ``two_groups``: param groups with settings of their own. ``skip``: why it is not tried."""

    name: str
    config: dict[str, Any]
    two_groups: bool = True
    skip: str | None = None

    @functools.cached_property
    def params(self) -> tuple[LookSAMConfig, dict[str, Any]]:
        """LookSAM's, and the base optimizer's."""
        return parse_params(self.config["optimizer"].get("params"), self.config["optimizer"]["type"])

    @property
    def settings(self) -> LookSAMConfig:
        return self.params[0]

    @property
    def updates(self) -> int:
        """Two SAM steps with their reuse steps, and the SAM step after them."""
        return self.settings.rho_schedule.off_updates + 2 * self.settings.k + 1

    @property
    def saved_at(self) -> int:
        """With k = 3 between the two reuse steps of the second cycle."""
        return self.updates - max(1, self.settings.k // 2) - 1


@dataclass
class Verdict:
    status: str
    detail: str = ""


class CannotTell(Exception):
    """There is nothing to compare with, and why."""


def check(case: Case, folder: Path | None) -> dict[str, Verdict]:
    ours = train(case, save_to=folder)
    checks = {"weights": _compare(case, ours)}
    if folder is None:
        checks["resume"] = Verdict(SKIPPED, "the ranks share no folder: --folder")
    else:
        resumed = train(case, load_from=folder)
        same = all(torch.equal(resumed.weights[name], weight) for name, weight in ours.weights.items())
        checks["resume"] = Verdict(RIGHT, "same bits") if same else Verdict(WRONG, "other weights than without a stop")
    checks["sends"] = _compare_sends(case, ours, train(case, plain=True))
    return checks


@dataclass
class Run:
    """Of one engine. ``hyper``: of each param group in each update. ``applied``: which windows were not skipped.
    ``sent``: in each update. ``weights``: fp32, whole, by name. ``lags``: see :func:`_weights`."""

    stage: int
    precision: str
    autocast: bool
    accumulation: int
    micro_batch: int
    clipping: float
    hyper: list[list[dict[str, Any]]] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    sent: list[Counter[Collective]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    lags: str | None = None
    evaluations: int = 0


def train(case: Case, save_to: Path | None = None, load_from: Path | None = None, plain: bool = False) -> Run:
    """An ordinary user's loop. Saves at ``case.saved_at``, or begins there with other weights and loads; ``plain``:
    the base optimizer alone. Collective."""
    config = json.loads(json.dumps(case.config))  # DeepSpeed's to change
    if plain:
        config["optimizer"].update(type=deepspeed_name(case.settings.base_optimizer), params=dict(case.params[1]))
        config["zero_allow_untested_optimizer"] = True
    model = Small(seed=0 if load_from is None else 1)
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=_groups(case, model, plain))
    try:
        precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
        result = Run(engine.zero_optimization_stage(), precision, engine.torch_autocast_enabled(),
                     engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu(),
                     engine.gradient_clipping())
        dtype = DTYPES[precision]
        if load_from is not None:
            engine.load_checkpoint(str(load_from))
        for update in range(0 if load_from is None else case.saved_at, case.updates):
            if save_to is not None and update == case.saved_at:
                engine.save_checkpoint(str(save_to))
            result.hyper.append([{key: group[key] for key in HYPER if key in group}
                                 for group in engine.optimizer.param_groups])
            with Sent() as sent:
                for x, y in micro_batches(result, update, dist.get_rank()):
                    engine.backward(engine(x.to(engine.device, dtype), y.to(engine.device, dtype)))
                    engine.step()
            result.sent.append(sent.collectives)
            result.applied.append(engine.was_step_applied())
        result.evaluations = 0 if plain else engine.looksam.evaluations
        result.weights, result.lags = _weights(engine, dtype)
        return result
    finally:
        engine.destroy()
        gc.collect()


class Small(nn.Module):
    """Called with (x, y) it returns its loss. One tensor holds most of the elements, so ZeRO cuts through it; one has a
    single element. No direction is flat: there a gradient is rounding, which Adam would make a step of."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.big = nn.Linear(FEATURES, 61)
            self.scale = nn.Parameter(torch.ones(1))
            self.head = nn.Linear(61, TARGETS)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.head(torch.tanh(self.big(x)) * self.scale), y)


def _groups(case: Case, model: nn.Module, plain: bool) -> list[Any]:
    """What deepspeed.initialize and the reference's optimizer get."""
    if not case.two_groups:
        return list(model.parameters())
    named = list(model.named_parameters())
    own = {} if plain else {"rho": 0.25, "alpha": "auto"}
    return [{"params": [p for name, p in named if name.endswith("weight")]},
            {"params": [p for name, p in named if not name.endswith("weight")], "lr": 0.03, "weight_decay": 0.0, **own}]


def micro_batches(run: Run, update: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One rank's part of a window, in fp32."""
    for i in range(run.accumulation):
        generator = torch.Generator().manual_seed(1_000_003 * update + 1009 * rank + i)
        x = torch.randn(run.micro_batch, FEATURES, generator=generator)
        yield x, torch.sin(2 * x[:, :TARGETS]) + torch.randn(run.micro_batch, TARGETS, generator=generator)


def _weights(engine: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], str | None]:
    """The fp32 weights; and the name of one that the model does not have as its optimizer has it. Collective.

    DeepSpeed 0.19.8 has no way to read the fp32 weights of stage 0 in bf16 and fp16, and shows wrong ones under
    round_robin_gradients: there the model's own are taken.
    """
    weights, lags = {}, None
    readable = engine.zero_optimization_stage() > 0 and not getattr(engine.optimizer, "round_robin_gradients", False)
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if is_partitioned(p) else nullcontext():
            model_s = p.detach().cpu().clone()
        weights[name] = (safe_get_full_fp32_param(p) if readable else model_s).detach().float().cpu().clone()
        if not torch.equal(weights[name].to(dtype), model_s):
            lags = name
    return weights, lags


# What is right --------------------------------------------------------------------------------------------------------


def _compare(case: Case, run: Run) -> Verdict:
    of_ranks = from_all_ranks(b"".join(w.contiguous().numpy().tobytes() for w in run.weights.values()))
    try:
        low = run.precision != "fp32" or run.autocast
        expected, evaluations = reference_weights(case, run, low)
        exact = reference_weights(case, run, False)[0] if low else expected
        plain = reference_weights(case, run, False, looksam=False)[0]
    except CannotTell as reason:
        return Verdict(SKIPPED, str(reason))
    got = _vector(run.weights)
    start = _vector(dict(Small().to(DTYPES[run.precision]).named_parameters()))
    moved = (expected - start).norm()
    error, effect = float((got - expected).norm() / moved), float((expected - plain).norm() / moved)
    tolerance = ROUNDING_FP32 + MARGIN * float((expected - exact).norm() / moved)
    tolerance += case.updates * 2**-24 * float(expected.norm() / moved)  # steps that are small beside the weights
    detail = f"{error:.1e} off, {tolerance:.1e} allowed"
    if not error <= tolerance:  # NaN
        return Verdict(WRONG, detail)
    if run.lags is not None:
        return Verdict(WRONG, f"the model's {run.lags} is not its optimizer's")
    if len(set(of_ranks)) > 1:
        return Verdict(WRONG, "not the same bits on every rank")
    if all(run.applied) and run.evaluations != evaluations:
        return Verdict(WRONG, f"{run.evaluations} evaluations in place of {evaluations}")
    if effect < 2 * tolerance:
        return Verdict(SKIPPED, f"{detail}, but all that LookSAM does here is {effect:.1e}: too little to tell")
    return Verdict(RIGHT, detail)


def _vector(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].detach().double().reshape(-1) for name in sorted(weights)])


def reference_weights(case: Case, run: Run, low: bool, looksam: bool = True) -> tuple[Tensor, int]:
    """ds_looksam/reference.py on all ranks' windows of a run: its weights as one vector, and its evaluations.

    Args:
        low: gradients in the run's precision, weights still in float64.
        looksam: False: rho and alpha 0.

    Raises:
        CannotTell: there is no reference for this base optimizer, or of what DeepSpeed does with it.
    """
    dtype = DTYPES[run.precision]
    model = Small().to(dtype).double()  # fp32 master weights start from the model's rounded ones
    base, settings = _base(case, _groups(case, model, plain=False)), case.settings
    reference = Reference(base, k=settings.k, rho=settings.rho, alpha=settings.alpha, layerwise=settings.layerwise,
                          layer_scale=settings.layer_scale, rho_schedule=settings.rho_schedule.model_dump(),
                          clipping=run.clipping, v_dtype=torch.bfloat16 if settings.v_dtype == "bf16" else None)
    if not looksam:
        for group in base.param_groups:
            group.update(rho=0.0, alpha=0.0)
    if run.stage == 0 and run.precision != "fp32":
        if run.precision == "fp16" and case.config["fp16"].get("loss_scale", 0) != 1:
            raise CannotTell("DeepSpeed 0.19.8 divides by a loss scale on stage 0 that it did not multiply by: use "
                             '"fp16": {"loss_scale": 1} or stage 1')
        for p in model.parameters():  # its wrappers step once with a gradient of 0 when they are built
            p.grad = torch.zeros_like(p)
        base.step()
    weights = dict(model.named_parameters())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if not low:
            return model(x.to(dtype).double(), y.to(dtype).double())
        scale = LOSS_SCALE if run.precision == "fp16" else 1.0
        # p itself, with a gradient of 1 / scale.
        cast = {name: (p / scale + (p - p / scale).detach()).to(dtype) for name, p in weights.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast):
            return functional_call(model, cast, (x.to(dtype), y.to(dtype))) * scale

    for update, hyper in enumerate(run.hyper):
        for group, values in zip(base.param_groups, hyper, strict=True):
            group.update(values)
        if run.applied[update]:
            ranks: list[list[Loss]] = [[functools.partial(loss, x, y) for x, y in micro_batches(run, update, rank)]
                                       for rank in range(dist.get_world_size())]
            reference.update(in_groups(ranks, settings.ascent))
    return _vector(weights), reference.evaluations


def in_groups(ranks: list[list[Loss]], ascent: str) -> list[list[Loss]]:
    """Who shares a perturbation, of each rank's micro-batches."""
    if ascent == "rank":
        return ranks
    if ascent == "global_micro_batch":
        return [list(losses) for losses in zip(*ranks, strict=True)]
    everything = [loss for losses in ranks for loss in losses]
    return [[loss] for loss in everything] if ascent == "micro_batch" else [everything]


def _base(case: Case, groups: list[Any]) -> torch.optim.Optimizer:
    name = case.settings.base_optimizer
    params = {**case.params[1], "torch_adam": True}
    build = base_class(deepspeed_name(name), params, offloaded=False)
    if build is None or build.__module__.startswith("deepspeed") or name.lower() == "muon":
        raise CannotTell(f"there is no plain {name} to compare with")
    return build(groups, **{key: value for key, value in params.items() if key not in ("torch_adam", "adam_w_mode")})


# What is sent ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """``kind``: c10d's name of the operation. ``nbytes``: of its largest argument."""

    kind: str
    nbytes: int

    @property
    def is_of_scalars(self) -> bool:
        return self.kind == "allreduce" and self.nbytes <= SCALARS


class Sent(TorchDispatchMode):
    """The collectives of a stretch of code, seen below every wrapper of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[Collective] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname not in ("monitored_barrier_", "barrier"):
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args]
            self.collectives[Collective(func._opname.strip("_"), max(sizes))] += 1
        return func(*args, **(kwargs or {}))


def _compare_sends(case: Case, ours: Run, plain: Run) -> Verdict:
    """The last two steps are a reuse step and a SAM step; what happens once is long over.

    Beside the window's evaluation, now twice, a SAM step publishes w + eps: all-gathers of no more than the model.
    """
    if case.settings.k == 1 or not all(ours.applied) or not all(plain.applied):
        return Verdict(SKIPPED, "k is 1: there is no reuse step" if case.settings.k == 1 else "an update was skipped")
    reuse, sam, base = ours.sent[-2], ours.sent[-1], plain.sent[-1]
    extra, missing = reuse - plain.sent[-2], plain.sent[-2] - reuse
    detail = f"reuse step +{_in_words(extra)}; SAM step +{_in_words(sam - base)}"
    if missing:
        return Verdict(WRONG, f"{detail}; a reuse step lacks {_in_words(missing)}")
    bulk = Counter({c: n for c, n in (sam - base - base).items() if not c.is_of_scalars})
    model = sum(p.numel() for p in Small().parameters()) * DTYPES[ours.precision].itemsize
    too_much = extra.total() > 1 or not all(c.is_of_scalars for c in extra)
    if case.settings.ascent == "global":
        too_much |= not all("allgather" in c.kind for c in bulk) or _nbytes(bulk) > 1.1 * model + SCALARS
    return Verdict(WRONG if too_much else RIGHT, detail)


def _nbytes(collectives: Counter[Collective]) -> int:
    return sum(c.nbytes * n for c, n in collectives.items())


def _in_words(collectives: Counter[Collective]) -> str:
    return f"{collectives.total()} ({_nbytes(collectives)} B)"
