"""Is LookSAM right on this machine? Trains tiny models here, and compares them with the algorithm written down plainly.

    torchrun --nproc-per-node N -m ds_looksam verify     (or deepspeed --module, mpirun; python -m for one process)

Every ZeRO stage in every precision that the accelerator has, with and without offload to the CPU, on the ranks that
were started. For each:
  weights   after two cycles of LookSAM those of ds_looksam/reference.py, and the same bits on every rank
  resume    a run that was saved in mid-cycle and loaded by another engine ends with the same bits
  sends     a reuse step sends what the base optimizer's step sends, and one all-reduce of scalars at most
What cannot be tried here is listed as skipped, with the reason. The exit code is 0 where all that was tried is right.
With --config the case is that JSON, batch sizes and schedules included, with a small model.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..config.deepspeed_keys import within
from ..config.params import OPTIMIZER_TYPES, parse_params
from ..config.rounding import DTYPES
from ..errors import LookSAMConfigError
from ..ranks.agree import from_all_ranks, raised_everywhere
from ..ranks.join import join
from ..ranks.versions import __version__
from .check import read_json, without_placeholders
from .output import print_table
from .verify_case import FAILED, LOSS_SCALE, RIGHT, SKIPPED, WRONG, Case, Verdict, check

LONGEST_WAIT = timedelta(minutes=5)
"""For another rank: compiling DeepSpeed's CPU optimizers takes a minute or two."""
LONGEST_OFF = 3
"""``off_updates`` of a JSON are cut to so many."""


@dataclass
class Row:
    case: str
    checks: dict[str, Verdict] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """The worst; where nothing is wrong, whether the weights were compared."""
        found = {verdict.status for verdict in self.checks.values()}
        return next((status for status in (FAILED, WRONG) if status in found), self.checks["weights"].status)


def run(config: Path | None = None, as_json: bool = False, quick: bool = False, only: str = "",
        folder: Path | None = None) -> int:
    """Join the other ranks, try the cases, print what came of them on rank 0. Collective."""
    cases = [case for case in (own_cases(quick) if config is None else cases_of(config)) if re.search(only, case.name)]
    with redirect_stdout(sys.stderr), warnings.catch_warnings():  # with --json only the result may be on stdout
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of what DeepSpeed calls
        join(LONGEST_WAIT)
        with shared_folder(folder) as place:
            rows = verify(cases, place)
    right, first = is_right(rows), dist.get_rank() == 0
    if first:
        (print_json if as_json else print_rows)(rows, right)
    # Leave: a thread of gloo's that still holds a tensor aborts an interpreter that ends.
    deepspeed.comm.destroy_process_group()
    gc.collect()
    return 1 if first and not right else 0  # of the others' failures a launcher would make many lines


def is_right(rows: Sequence[Row]) -> bool:
    """Nothing is wrong, and something is right."""
    found = {row.status for row in rows}
    return RIGHT in found and found <= {RIGHT, SKIPPED}


def verify(cases: Sequence[Case], folder: Path | None) -> list[Row]:
    """Try the cases on the process group that there is. ``folder``: seen by all ranks; None: nothing is resumed.
    Collective; the same on every rank. Raises Exception: what one rank alone raised, which leaves the others in another
    place."""
    rows = []
    for number, case in enumerate(cases):
        row, start = Row(case.name), time.monotonic()
        if case.skip is not None:
            row.checks["weights"] = Verdict(SKIPPED, case.skip)
        else:
            try:
                row.checks = check(case, None if folder is None else folder / str(number))
            except Exception as error:
                if raised_everywhere(error, dist.group.WORLD, f"verify, {case.name}") is not None:
                    raise
                row.checks["weights"] = Verdict(FAILED, " ".join(f"{type(error).__name__}: {error}".split()))
            worst_first, of_ranks = (FAILED, WRONG, SKIPPED, RIGHT), from_all_ranks(row.checks)
            row.checks = {name: min((checks[name] for checks in of_ranks), key=lambda v: worst_first.index(v.status))
                          for name in row.checks}
        row.seconds = time.monotonic() - start
        rows.append(row)
        if dist.get_rank() == 0:
            print(f"{row.status:8} {row.case} ({row.seconds:.1f} s)", file=sys.stderr, flush=True)
    return rows


# The cases -----------------------------------------------------------------------------------------------------------


def own_cases(quick: bool = False) -> Iterator[Case]:
    """Every supported stage x precision, x offload, x ascent; Look-LayerSAM once per stage.
    ``quick``: fp32 and bf16, each stage once."""
    for stage in range(4):
        for precision in ("fp32", "bf16") if quick else DTYPES:
            yield _case(stage, precision)
        if quick:
            continue
        yield _case(stage, "fp32", "Look-LayerSAM", type="LookLayerSAM")
        if stage == 1:  # another wrapper: BF16_Optimizer
            yield _case(stage, "bf16", "gradients in fp32", data_types={"grad_accum_dtype": "fp32"})
        for precision in ("fp32", "bf16") if stage > 0 else ():
            yield _case(stage, precision, "offload", zero={"offload_optimizer": {"device": "cpu"}})
    for stage in (1, 3) if quick else range(4):
        for ascent in ("global_micro_batch", ) if stage == 3 else ("rank", "micro_batch", "global_micro_batch"):
            for precision in ("fp32", ) if quick else ("fp32", "bf16"):
                yield _case(stage, precision, f"ascent {ascent}", params={"ascent": ascent})


def _case(stage: int, precision: str, what: str = "", type: str = "LookSAM", zero: Mapping[str, Any] = {},
          params: Mapping[str, Any] = {}, **config: Any) -> Case:
    if stage == 3:  # of the small model's tensors some stay gathered and some do not
        zero = {"stage3_param_persistence_threshold": 20, **zero}
    config |= {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.6,
        "zero_optimization": {"stage": stage, **zero},
        # eps so large that no element of the gradient is so small that Adam turns its rounding into a whole step.
        "optimizer": {"type": type, "params": {"k": 3, "rho": 0.5, "alpha": 0.7, "lr": 0.01, "eps": 1e-3,
                                               "weight_decay": 0.1, **params}},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if precision == "fp16":  # on stage 0 DeepSpeed 0.19.8 does not multiply by the scale that it divides by
        config["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE if stage > 0 else 1}
    return Case(", ".join(filter(None, [f"stage {stage}", precision, what])), config, skip=_not_here(precision))


def _not_here(precision: str) -> str | None:
    accelerator = get_accelerator()
    if {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}[precision]:
        return None
    on_a_cpu = "; on a CPU it wants AVX512-FP16" if accelerator.device_name() == "cpu" else ""
    return f"DeepSpeed says that this accelerator has no {precision}{on_a_cpu}"


def cases_of(path: Path) -> Iterator[Case]:
    """That of a user's JSON, which ``deepspeed.initialize`` may still refuse; in low precision a second one that the
    rounding of so small a model does not hide. Raises LookSAMConfigError: it is no JSON, or not one that trains with
    LookSAM."""
    given, _ = read_json(path)
    optimizer = within(given, "optimizer")
    if optimizer.get("type") not in OPTIMIZER_TYPES:
        raise LookSAMConfigError(f"{path}: optimizer.type is {optimizer.get('type')!r}; verify is for "
                                 f"{' and '.join(OPTIMIZER_TYPES)}")
    config, left_out = without_placeholders(given, lambda key: key != "optimizer.params.alpha")
    if not any(key.startswith("train_") for key in config):
        config["train_micro_batch_size_per_gpu"] = 4
    for block in ("tensorboard", "wandb", "comet", "csv_monitor"):
        config.pop(block, None)  # runs of a small model are not to be logged
    params = within(config["optimizer"], "params")
    name = [str(path), *([f"without {', '.join(left_out)}"] if left_out else [])]
    schedule = within(params, "rho_schedule")
    off_updates = schedule.get("off_updates", 0)
    if isinstance(off_updates, int) and off_updates > LONGEST_OFF:
        params = {**params, "rho_schedule": {**schedule, "off_updates": LONGEST_OFF}}
        config["optimizer"]["params"] = params
        name.append(f"off_updates {LONGEST_OFF}")
    yield Case(", ".join(name), config, two_groups=False)
    if any(within(config, block).get("enabled") for block in ("bf16", "fp16", "torch_autocast")):
        settings, _ = parse_params(params, optimizer["type"])
        louder = {"rho": max(settings.rho, min(10 * settings.rho, 0.5)),
                  "alpha": 0.7 if isinstance(settings.alpha, str) else settings.alpha}
        config = {**config, "optimizer": {**config["optimizer"], "params": {**params, **louder}}}
        yield Case(", ".join([*name, *(f"{key} {value}" for key, value in louder.items())]), config, two_groups=False)


# Processes and output -------------------------------------------------------------------------------------------------


@contextmanager
def shared_folder(parent: Path | None) -> Iterator[Path | None]:
    """A new folder for checkpoints, removed afterwards; None where the ranks do not all see it. Collective."""
    first = dist.get_rank() == 0
    path = Path(from_all_ranks(tempfile.mkdtemp(prefix="looksam-verify-", dir=parent) if first else "")[0])
    try:
        yield path if all(from_all_ranks(path.is_dir())) else None
    finally:
        if first:
            shutil.rmtree(path, ignore_errors=True)


def print_rows(rows: Sequence[Row], right: bool) -> None:
    names = ("weights", "resume", "sends")
    print_table(_where(), [(row.status, row.case, *(_cell(row.checks.get(name, Verdict(""))) for name in names))
                           for row in rows], ("", "case", *names))
    counts = Counter(row.status for row in rows)
    print(f"\n{', '.join(f'{n} {status}' for status, n in counts.items()) or 'no case of that name'}: "
          f"{'LookSAM is right here' if right else 'LookSAM is NOT shown to be right here'}")


def _cell(verdict: Verdict) -> str:
    return f"{verdict.status}: {verdict.detail}" if verdict.status in (WRONG, FAILED) else verdict.detail


def print_json(rows: Sequence[Row], right: bool) -> None:
    print(json.dumps({"right": right, "where": _where(), "rows": [{**asdict(row), "status": row.status}
                                                                  for row in rows]}, indent=1))


def _where() -> str:
    return (f"ds_looksam {__version__}, DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, "
            f"{dist.get_world_size()} ranks on {get_accelerator().device_name()} through {dist.get_backend()}")
