"""One training case, run twice: by DeepSpeed with LookSAM on several ranks, and by the oracle. The one comparator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import oracle
from .models import CLASSES, FEATURES, make_model
from .ranks import run_on_ranks

BUILD_OPTIONS = ("adam_w_mode", "torch_adam")
"""Parameters of a base optimizer that choose its class, and are no hyper-parameters of its groups."""

BASE_PARAMS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "Lamb": {"eps": 1e-6},
    "Lars": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02},
    "Adagrad": {"lr": 0.05, "weight_decay": 0.01, "eps": 1e-8},
    "Lion": {"lr": 3e-3, "betas": (0.9, 0.99)},
    "Muon": {"lr": 0.02, "momentum": 0.9, "eps": 1e-6, "betas": (0.9, 0.95)},
    "Adam": {"adam_w_mode": False},  # with L2 regularisation; DeepSpeed takes "Adam" for AdamW unless it is told
}
LINEAR = nn.functional.linear
TOLERANCE = 1e-5
"""fp32 rounds at 6e-8. A gradient is a sum of some 10 products through 4 layers, 24 gradients and 12 updates follow one
another at most, and Adam divides by the root of a mean that starts at one square: 100 times the rounding unit."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """Everything that decides a run. ``zero`` and ``config`` are merged into the DeepSpeed JSON, ``params`` into
    LookSAM's keys, ``options`` into the base optimizer's on both sides. ``rounding``: as the oracle rounds w + eps."""

    model: str = "mlp"
    world: int = 2
    stage: int = 2
    accumulation: int = 1
    clipping: float = 0.0
    k: int = 3
    rho: float = 0.1
    alpha: float | str = "auto"
    base: str = "AdamW"
    layer_scale: str | None = None
    ascent: str = "global"
    two_groups: bool = False
    precision: str = "fp32"
    loss_scale: float = 1.0
    rounding: str = "nearest"
    updates: int = 12
    micro_batch: int = 4
    seed: int = 0
    zero_init: bool = False
    params: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def base_params(self) -> dict[str, Any]:
        return {"lr": 1e-2, "weight_decay": 0.1, **BASE_PARAMS.get(self.base, {}), **self.options}

    @property
    def by_layer(self) -> bool:
        """Whether the base optimizer has trust ratios."""
        return self.base in ("Lamb", "Lars")

    @property
    def second_group(self) -> dict[str, Any]:
        """Also left out of everything layer-wise; at a learning rate of its own, since that changes the step's size."""
        group = {"lr": 3 * self.base_params["lr"], "weight_decay": 0.0, "rho": self.rho / 2}
        if self.layer_scale is not None:
            group["layerwise"] = False
        if self.by_layer:
            group.update(trust_ratio=False, lr=0.01)
        return group

    def json(self, looksam: bool = True) -> dict[str, Any]:
        """The DeepSpeed configuration; without ``looksam`` that of the base optimizer alone."""
        layerwise = self.layer_scale is not None
        own = {"k": self.k, "rho": self.rho, "alpha": self.alpha, "base_optimizer": self.base, **self.params,
               **({"layer_scale": self.layer_scale} if layerwise else {}),
               **({"ascent": self.ascent} if self.ascent != "global" else {}),
               **({"rounding": self.rounding} if self.precision != "fp32" else {})}
        scale = {"loss_scale": self.loss_scale} if self.precision == "fp16" else {}
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clipping,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "optimizer": {"type": "LookLayerSAM" if layerwise else "LookSAM",
                          "params": {**own, **self.base_params}} if looksam else
                         {"type": f"Zero{self.base}" if self.by_layer else self.base, "params": self.base_params},
            # DeepSpeed asks for this flag with SGD, with or without LookSAM.
            "zero_allow_untested_optimizer": True,
            **({self.precision: {"enabled": True, **scale}} if self.precision != "fp32" else {}),
            **self.config,
        }

    def _groups(self, names: Iterable[str]) -> list[tuple[list[str], dict[str, Any]]]:
        """The names of each param group, and what it has of its own."""
        if not self.two_groups:
            return [(list(names), {})]
        return [([n for n in names if not n.endswith("bias")], {}),
                ([n for n in names if n.endswith("bias")], self.second_group)]

    def model_parameters(self, module: nn.Module) -> Any:
        """What the user hands to deepspeed.initialize."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups = [{"params": [trained[name] for name in names], **own} for names, own in self._groups(trained)]
        return groups if self.two_groups else groups[0]["params"]

    def oracle_groups(self, module: nn.Module) -> list[oracle.Group]:
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        hyper = {key: value for key, value in self.base_params.items() if key not in BUILD_OPTIONS}
        return [oracle.Group(names=part, **{**hyper, "rho": self.rho, "alpha": self.alpha, **own})
                for part, own in self._groups(names)]

    def micro_batches(self, update: int, rank: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's micro-batches of one accumulation window, x in float64."""
        return [self._micro_batch(update, rank, i) for i in range(self.accumulation)]

    def window(self, update: int) -> list[tuple[Tensor, Tensor]]:
        """One rank's micro-batches after the other's."""
        return [mb for rank in range(self.world) for mb in self.micro_batches(update, rank)]

    def ascent_groups(self, window: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
        """What of :meth:`window` shares a perturbation."""
        step = self.accumulation
        return {
            "global": [window],
            "rank": [window[i:i + step] for i in range(0, len(window), step)],
            "micro_batch": [[micro_batch] for micro_batch in window],
            "global_micro_batch": [window[i::step] for i in range(step)],
        }[self.ascent]

    def _micro_batch(self, update: int, rank: int, i: int) -> tuple[Tensor, Tensor]:
        # Numbered over the whole window, so that world x accumulation sees the same samples however it is split.
        number = rank * self.accumulation + i
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * update + number)
        x = torch.randn(self.micro_batch, FEATURES, generator=generator, dtype=torch.float64)
        y = torch.randint(0, CLASSES, (self.micro_batch, ), generator=generator)
        # What the model "sometimes" looks at: the same on every rank, and another in the window's next micro-batch.
        y[0] = (update // 2 + (i if self.model == "sometimes" else 0)) % 2
        return x, y


@dataclass
class Result:
    """Of one rank. Weights are fp32 and whole: the fp32 master's, and the model's own in its dtype. ``history``: of
    each update, see :func:`train`."""

    weights: dict[str, Tensor]
    model_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[Any] = field(default_factory=list)
    forwards: int = 0
    evaluations: int = 0
    updates: int = 0
    extra: Any = None


@contextmanager
def engine_for(case: Case, looksam: bool = True, module: nn.Module | None = None,
               adapt: Callable[[dict[str, Any]], None] | None = None, **initialize: Any) -> Iterator[Any]:
    """A DeepSpeed engine on this rank, destroyed afterwards; ``initialize`` goes to deepspeed.initialize. Collective.
    """
    import deepspeed

    import ds_looksam  # noqa: F401 - the import is what a user writes

    config = case.json(looksam)
    if adapt is not None:
        adapt(config)
    _let_cpu_compute_fp16(case.precision == "fp16")
    if module is None:
        with deepspeed.zero.Init(config_dict_or_path=config) if case.zero_init else nullcontext():
            module = make_model(case.model, case.seed)
    parameters = case.model_parameters(module)
    if not looksam and isinstance(parameters[0], dict):
        parameters[1].pop("rho", None)
    engine, *_ = deepspeed.initialize(model=module, config=config, model_parameters=parameters, **initialize)
    try:
        # Muon's functions are compiled, and two ranks that were given other shapes before do not round alike then.
        with torch.compiler.set_stance("force_eager") if case.base == "Muon" else nullcontext():
            yield engine
    finally:
        engine.destroy()
        forget_process_wide_settings()


def forget_process_wide_settings() -> None:
    """What an engine sets in DeepSpeed for the life of the process would decide how the next one reduces."""
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import groups

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    nn.functional.linear = LINEAR  # ZeRO stage 3 puts its own there, and leaves it
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def _let_cpu_compute_fp16(yes: bool) -> None:
    """DeepSpeed refuses fp16 on a CPU without AVX512-FP16, for speed: torch computes it there too, just slowly. Where
    it has fp16, Muon computes in it whatever the model's dtype is."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        get_accelerator().is_fp16_supported = lambda: yes


def batches_for(engine: Any, case: Case, update: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of one accumulation window, as the engine's model takes them."""
    return [(x.to(engine.device, DTYPES[case.precision]), y.to(engine.device))
            for x, y in case.micro_batches(update, torch.distributed.get_rank())]


def managed(engine: Any, batches: list[tuple[Tensor, Tensor]]) -> None:
    """One accumulation window of an ordinary user's loop."""
    for x, y in batches:
        engine.backward(engine(x, y))
        engine.step()


def train_window(engine: Any, case: Case, update: int) -> None:
    managed(engine, batches_for(engine, case, update))


def master_weights(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights by name, whole, in every rank's host memory. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    if getattr(engine.optimizer, "round_robin_gradients", False):
        # DeepSpeed 0.19.8's API looks for each parameter where it would lie without this option.
        assert not engine.fp16_enabled() and not engine.bfloat16_enabled(), "fp32 weights are only visible in fp32"
        return visible_weights(engine)
    weights, masters = {}, _replicated_masters(engine)
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            full = masters.get(id(p), p)
            if full is p and (hasattr(p, "_hp_mapping") or hasattr(p, "ds_id")):
                full = safe_get_full_fp32_param(p)
            weights[name] = full.detach().float().cpu().clone()
    return weights


def _replicated_masters(engine: Any) -> dict[int, Tensor]:
    """The master weights of ZeRO stage 0 in bf16 or fp16, by id of the model's parameter: DeepSpeed has no API for it.
    """
    groups = getattr(engine.optimizer, "fp16_groups", None) if engine.zero_optimization_stage() == 0 else None
    masters = {}
    for i, params in enumerate(groups or []):
        if hasattr(engine.optimizer, "fp32_groups"):
            flats = engine.optimizer.fp32_groups[i]
        else:
            flats = engine.optimizer.fp32_groups_flat[i].split([p.numel() for p in params])
        masters.update({id(p): flat.view(p.shape) for p, flat in zip(params, flats, strict=True)})
    return masters


def visible_weights(engine: Any) -> dict[str, Tensor]:
    """The weights the model computes with, in its dtype, in host memory: what user code sees. Collective."""
    import deepspeed

    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters([p for _, p in named if hasattr(p, "ds_id")]):
        return {name: p.detach().cpu().clone() for name, p in named}


def train(case: Case, looksam: bool = True, module: Callable[[], nn.Module] | None = None,
          after: Callable[[Any], Any] | None = None,
          loop: Callable[[Any, list[tuple[Tensor, Tensor]]], Any] = managed) -> Result:
    """Run a case on this rank of the process group that is there. Collective.

    ``module`` builds another model than the case's; ``loop`` is called with the engine and each window's micro-batches,
    and then ``after`` with the engine: what they return is the result's ``history``.
    """
    with engine_for(case, looksam, module=module and module()) as engine:
        calls: list[None] = []
        engine.module.register_forward_hook(lambda *_: calls.append(None))
        history = []
        for update in range(case.updates):
            told = loop(engine, batches_for(engine, case, update))
            history.append(after(engine) if after is not None else told)
        status = getattr(engine, "looksam", None)
        return Result(weights=master_weights(engine), model_weights=visible_weights(engine), history=history,
                      forwards=len(calls), evaluations=status.evaluations if status else case.updates,
                      updates=status.updates if status else engine.global_steps)


def start_oracle(case: Case, dtype: torch.dtype = torch.float64, v_dtype: torch.dtype = torch.float64,
                 autocast: torch.dtype | None = None, module: nn.Module | None = None
                 ) -> tuple[oracle.Oracle, nn.Module, list[oracle.Group]]:
    """The oracle before its first update, and what :func:`named` asks for. ``module``: another than the case's."""
    if autocast is not None:
        dtype = torch.float32
    module = make_model(case.model, case.seed) if module is None else module
    if case.precision != "fp32":
        module.to(DTYPES[case.precision])  # DeepSpeed's master starts from the model's rounded weights
    groups = [group for group in case.oracle_groups(module) if group.names]
    reference = oracle.build(module, groups, base=case.base, k=case.k, clipping=case.clipping, dtype=dtype,
                             layer_scale=case.layer_scale, autocast=autocast,
                             loss_scale=case.loss_scale if case.precision == "fp16" and case.stage > 0 else 1.0)
    reference.groups_of = case.ascent_groups
    reference.v_dtype = v_dtype
    reference.orthogonalises_first = case.stage > 0
    if case.stage == 0 and case.precision != "fp32":
        # Oddities of plain DeepSpeed 0.19.8 (shards/fp16.py): a step with gradient 0 when the wrapper is built, which
        # the model's weights do not show until the first update, and gradients divided by a loss scale they don't have.
        if not case.by_layer:  # LAMB and LARS see that it is no update
            reference.stale_w = reference.w
            reference.w = reference.base.step(reference.w, torch.zeros_like(reference.w))
        reference.divisor = case.loss_scale if case.precision == "fp16" else 1.0
    schedule = case.params.get("rho_schedule", {})
    reference.off = schedule.get("off_updates", 0)
    reference.rho_factor = oracle.rho_factor(schedule)
    return reference, module, groups


def run_oracle(case: Case, dtype: torch.dtype = torch.float64, v_dtype: torch.dtype = torch.float64,
               autocast: torch.dtype | None = None, rounding: Callable[[Tensor], Tensor] | None = None,
               module: nn.Module | None = None) -> tuple[oracle.Oracle, dict[str, Tensor]]:
    """The same case by the oracle: the oracle itself, and its weights by name.

    ``rounding``: what becomes of the weights after each update.
    """
    reference, module, groups = start_oracle(case, dtype, v_dtype, autocast, module)
    for update in range(case.updates):
        reference.update(case.window(update))
        if rounding is not None:
            reference.w = rounding(reference.w)
    return reference, named(reference.w, module, groups)


def named(w: Tensor, module: nn.Module, groups: list[oracle.Group]) -> dict[str, Tensor]:
    """The oracle's vector as tensors by name."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    names = [name for group in groups for name in group.names]
    parts = w.split([shapes[name].numel() for name in names])
    return {name: part.view(shapes[name]) for name, part in zip(names, parts, strict=True)}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative error over all weights as one vector. The names and shapes must be the same."""
    assert {name: w.shape for name, w in got.items()} == {name: w.shape for name, w in expected.items()}
    return oracle.relative_error(torch.cat([got[n].double().reshape(-1) for n in expected]),
                                 torch.cat([expected[n].double().reshape(-1) for n in expected]))


def check_against_oracle(case: Case, tolerance: float, dtype: torch.dtype = torch.float64,
                         v_dtype: torch.dtype = torch.float64) -> oracle.Oracle:
    """Train on ``case.world`` ranks, and compare every rank's weights with the oracle's; what else is compared, see
    :func:`compare_with_oracle`, and what is allowed, :func:`allowed`.

    In low precision (``dtype``) the run may be another one that rounds as well as the oracle: :func:`error_to_nearest`.
    """
    reference, error, weights = compare_with_oracle(case, dtype, v_dtype)
    tolerance = allowed(case, tolerance, error, reference)
    if error > tolerance and dtype in (torch.bfloat16, torch.float16):
        error = error_to_nearest(weights, case, dtype, v_dtype)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e} for {case}"
    return reference


ROUNDING = 20
"""Seen over 40 cases of the grid: 1.0 to 1.4 with SGD, 4 to 12 with AdamW, whose operators keep their moments and
1 - beta2^t, which starts at 1e-3, in fp32 too."""


def allowed(case: Case, tolerance: float, error: float, reference: oracle.Oracle) -> float:
    """``tolerance`` is for a g_v that is used at its own length. A fixed alpha makes a short g_v (small rho, flat loss)
    as long as alpha ‖g‖, and its rounding error with it; the 10 lets the usual alpha and rho pass without an allowance.

    Samples on which an element of the gradient happens to cancel, so that Adam divides rounding by rounding, are held
    to what they leave to anybody: ``ROUNDING`` times the error of a naive program in fp32, which computes gradients in
    fp32 and rounds its weights to fp32 after each update; and never more than 1e-4.
    """
    tolerance *= max(1.0, reference.amplification / 10)
    if error > tolerance and case.precision == "fp32":
        _, naive = run_oracle(case, torch.float32, rounding=lambda w: w.float().double())
        tolerance = max(tolerance, min(ROUNDING * distance(naive, run_oracle(case)[1]), 1e-4))
    return tolerance


NUDGES = (1e-7, 3e-7, 1e-6)
"""fp32 rounds at 6e-8, and an update of a weight is some ten operations."""


def error_to_nearest(weights: dict[str, Tensor], case: Case, dtype: torch.dtype,
                     v_dtype: torch.dtype = torch.float64, seeds: int = 24) -> float:
    """Relative error to the nearest of the oracles whose weights are off, after each update, by what fp32 rounds.

    A master weight that close to a boundary between two numbers of bf16 or fp16 is rounded to either side, and the next
    evaluation sees it a whole step (2^-8, 2^-11 of itself) apart. One run of some fifteen of test_options' has
    such a weight and ends 1e-3 away from the oracle, but 1e-6 from an oracle that took the same side.
    """
    def error(nudge: float, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)

        def off(w: Tensor) -> Tensor:
            return w * (1 + nudge * torch.randn(w.shape, generator=generator, dtype=torch.float64))

        return distance(weights, run_oracle(case, dtype, v_dtype, rounding=off)[1])

    return min(error(nudge, seed) for nudge in NUDGES for seed in range(seeds))


def compare_with_oracle(case: Case, dtype: torch.dtype = torch.float64, v_dtype: torch.dtype = torch.float64
                        ) -> tuple[oracle.Oracle, float, dict[str, Tensor]]:
    """Train on ``case.world`` ranks: the oracle, the weights of the run, and their relative error.

    Asserts: the model computes with the master's weights (nothing perturbed is left behind), every rank holds the same
    bits, and the evaluations are those of Algorithm 1.
    """
    reference, expected = run_oracle(case, dtype, v_dtype)
    results = run_on_ranks(case.world, train, case)
    for rank, result in enumerate(results):
        for name, weight in result.weights.items():
            assert torch.equal(weight, results[0].weights[name]), f"rank {rank} differs from rank 0 in {name}"
            assert torch.equal(result.model_weights[name], weight.to(DTYPES[case.precision])), \
                f"rank {rank}: the model's {name} is not the master's"
        assert (result.updates, result.evaluations) == (case.updates, reference.evaluations)
        assert reference.evaluations == case.updates + max(0, -(-(case.updates - reference.off) // case.k))
        assert result.forwards == result.evaluations * case.accumulation
    return reference, distance(results[0].weights, expected), results[0].weights


def as_plain(case: Case) -> Case:
    """The case whose LookSAM is its base optimizer: rho 0 and alpha 0."""
    return replace(case, rho=0.0, alpha=0.0)
