"""``ds-looksam verify``: it runs under a launcher, takes a user's JSON, and sees what is broken on purpose."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from ds_looksam import LookSAMConfig, LookSAMConfigError, LookSAMEngine
from ds_looksam.cli import main
from ds_looksam.cli.verify import Row, cases_of, is_right, own_cases, verify
from ds_looksam.cli.verify_case import FAILED, RIGHT, SKIPPED, WRONG
from ds_looksam.shards.replicated import ReplicatedShards

from .ranks import run_on_ranks

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> tuple[int, str]:
    """Exit code of ``ds-looksam verify`` on a process group that is there and stays, and what it has on stdout."""
    with patch("deepspeed.comm.destroy_process_group"), redirect_stdout(io.StringIO()) as out:
        return main(["verify", *arguments]), out.getvalue()


def test_two_ranks() -> None:
    (code, out), other = run_on_ranks(2, command, "--quick", "--json", "--only", "stage 2, fp32$")
    assert code == 0 and other == (0, "")
    result = json.loads(out)  # nothing else is on stdout
    assert result["right"] and "2 ranks" in result["where"]
    (row, ) = result["rows"]
    assert {name: check["status"] for name, check in row["checks"].items()} == {
        "weights": RIGHT, "resume": RIGHT, "sends": RIGHT}


@pytest.mark.parametrize("launcher", [
    [], pytest.param(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], marks=pytest.mark.grid)])
def test_a_refused_json_as_a_program(launcher: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, zero_optimization={"stage": 2, "zero_quantized_weights": True})
    done = subprocess.run([sys.executable, *launcher, "-m", "ds_looksam", "verify", "--config", str(path)], cwd=ROOT,
                          text=True, capture_output=True, timeout=240)
    assert done.returncode == 1, done.stderr
    assert "FAILED: LookSAMConfigError" in done.stdout and "zero_quantized_weights" in done.stdout
    assert "LookSAM is NOT shown to be right here" in done.stdout


# A user's JSON --------------------------------------------------------------------------------------------------------


def write(folder: Path, params: dict[str, Any] | None = None, **changes: Any) -> Path:
    config: dict[str, Any] = {
        "train_batch_size": 8, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "LookSAM", "params": {"lr": 0.01, **(params or {})}}} | changes
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def on_this_rank(path: Path, folder: Path | None) -> list[Row]:
    return verify(list(cases_of(path)), folder)


SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 5, "warmup_type": "linear"}}


@pytest.mark.parametrize("params, changes, told", [
    ({"k": 2, "rho": 0.3, "rho_schedule": {"type": "lr", "off_updates": 500}},
     {"scheduler": SCHEDULER, "gradient_accumulation_steps": 2}, "off_updates 3"),
    ({"base_optimizer": "Lamb", "layerwise": True, "rho": 0.3, "alpha": 0.5, "v_dtype": "bf16"},
     {"optimizer.weight_decay": "auto"}, "without optimizer.weight_decay"),
    ({"base_optimizer": "SGD", "momentum": 0.9, "k": 1}, {"gradient_clipping": 0.1}, ""),
    ({"base_optimizer": "Adam", "adam_w_mode": False, "weight_decay": 0.1}, {"zero_optimization": {"stage": 0}}, ""),
], ids=["schedules", "lamb", "sgd", "adam"])
def test_config(params: dict[str, Any], changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    rows = run_on_ranks(2, on_this_rank, write(tmp_path, params, **changes), tmp_path)[0]
    assert [row.status for row in rows] == [RIGHT], rows
    assert rows[0].case.endswith(told)
    assert rows[0].checks["sends"].status == (SKIPPED if params.get("k") == 1 else RIGHT)


@pytest.mark.parametrize("params, changes", [
    ({"rho_schedule": {"type": "lr", "off_updates": "5"}}, {}), ({"rho_schedule": "lr"}, {}), ({}, {"bf16": None}),
    ({}, {"optimizer": "LookSAM"})])
def test_a_json_of_other_types_is_refused_and_no_crash(params: dict[str, Any], changes: dict[str, Any],
                                                       tmp_path: Path) -> None:
    path = write(tmp_path, params, **changes)
    if "optimizer" in changes:
        with pytest.raises(LookSAMConfigError, match=r"optimizer\.type is None"):
            list(cases_of(path))
    else:
        assert [case.config for case in cases_of(path)] == [json.loads(path.read_text())]


def test_low_precision_with_a_small_rho_is_told_by_a_second_case(tmp_path: Path) -> None:
    rows = run_on_ranks(2, on_this_rank, write(tmp_path, {"rho": 0.02}, bf16={"enabled": True}), None)[0]
    assert [row.status for row in rows] == [SKIPPED, RIGHT], rows
    assert "too little to tell" in rows[0].checks["weights"].detail
    assert rows[1].case.endswith("rho 0.2, alpha 0.7")
    assert rows[1].checks["resume"].status == SKIPPED  # without a folder that all ranks see
    assert is_right(rows) and not is_right(rows[:1])


def test_own_cases() -> None:
    with patch.object(get_accelerator(), "is_fp16_supported", lambda: False):
        cases = {case.name: case.skip for case in own_cases()}
    skipped = {name for name, reason in cases.items() if "AVX512-FP16" in str(reason)}
    assert skipped == {name for name, reason in cases.items() if reason} == {f"stage {n}, fp16" for n in range(4)}
    assert {f"stage {stage}, bf16, offload" for stage in (1, 2, 3)} < set(cases)
    modes = {*get_args(LookSAMConfig.model_fields["ascent"].annotation)} - {"global"}
    for stage, supported in ((2, modes), (3, {"global_micro_batch"})):
        assert {name for name in cases if f"stage {stage}" in name and "ascent" in name} == {
            f"stage {stage}, {precision}, ascent {mode}" for precision in ("fp32", "bf16") for mode in supported}


# Made possible here, and broken on purpose ----------------------------------------------------------------------------


def everywhere(name: str, change: Callable[[Any], Any]) -> list[Any]:
    """Patches of a function in every module of the package that has it under this name."""
    return [patch.object(module, name, change(getattr(module, name))) for module in list(sys.modules.values())
            if module.__name__.startswith("ds_looksam.") and callable(getattr(module, name, None))]


def more_is_sent(real: Any) -> Any:
    def sum_twice(sums: Tensor, group: Any) -> Tensor:
        real(sums.new_zeros(1000), group)
        return real(sums, group)
    return sum_twice


def beta_is_not_loaded(real: Any) -> Any:
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        self.looksam.beta = None
        return result
    return load


def cannot_be_built(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("Ninja is required to load C++ extensions")


CHANGES: dict[str, Callable[[], list[Any]]] = {
    "fp16": lambda: [patch.object(get_accelerator(), "is_fp16_supported", lambda: True)],  # torch has it on every CPU
    "weaker reuse": lambda: everywhere("reuse_strength", lambda real: lambda *args: 0.95 * real(*args)),
    "norms of one rank": lambda: everywhere(
        "sum_over_ranks", lambda real: lambda sums, group: sums * torch.distributed.get_world_size()),
    "weights stay perturbed": lambda: [patch.object(ReplicatedShards, "unperturb_local", lambda self: None)],
    "beta is not loaded": lambda: [
        patch.object(LookSAMEngine, "load_checkpoint", beta_is_not_loaded(LookSAMEngine.load_checkpoint))],
    "more is sent": lambda: everywhere("sum_over_ranks", more_is_sent),
    "one perturbation for all": lambda: everywhere("in_groups", lambda real: lambda ranks, _: real(ranks, "global")),
    "no CPU Adam": lambda: [patch.object(DeepSpeedCPUAdam, "__init__", cannot_be_built)],
}


def verify_changed(what: str, case: str, folder: Path) -> list[Row]:
    with ExitStack() as stack:
        patches = CHANGES[what]()
        assert patches, "there is nothing of this name to break"
        for one in patches:
            stack.enter_context(one)
        return verify([one for one in own_cases() if one.name == case], folder)


@pytest.mark.parametrize("what, case, check, status", [
    ("fp16", "stage 0, fp16", "weights", RIGHT), ("fp16", "stage 2, fp16", "weights", RIGHT),
    ("weaker reuse", "stage 2, fp32", "weights", WRONG),
    ("norms of one rank", "stage 3, bf16", "weights", WRONG),
    ("weights stay perturbed", "stage 0, fp32", "weights", WRONG),
    ("beta is not loaded", "stage 2, fp32", "resume", WRONG),
    ("more is sent", "stage 3, fp32", "sends", WRONG),
    ("one perturbation for all", "stage 1, bf16, ascent rank", "weights", WRONG),
    ("no CPU Adam", "stage 2, fp32, offload", "weights", FAILED),
])
def test_what_is_changed_is_seen(what: str, case: str, check: str, status: str, tmp_path: Path) -> None:
    (row, ) = rows = run_on_ranks(2, verify_changed, what, case, tmp_path)[0]
    assert row.status == status and row.checks[check].status == status, row
    assert is_right(rows) == (status == RIGHT)
    if status == FAILED:
        assert "Ninja is required" in row.checks[check].detail
