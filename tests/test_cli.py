"""The command line: what it says about a configuration is what deepspeed.initialize would say, and what runs cost."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from ds_looksam.cli import main, plot
from ds_looksam.config.rounding import rounding_warning
from ds_looksam.config.support import REFUSED
from ds_looksam.config.support_table import SUPPORTED
from ds_looksam.ranks.versions import __version__

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.json"))


@pytest.fixture
def check(tmp_path, capsys):
    """Runs ``check`` on a working configuration with changes merged in; returns (exit code, stdout, stderr)."""

    def run(*arguments: str, **changes: Any) -> tuple[int, str, str]:
        config: dict[str, Any] = {
            "train_batch_size": 8, "optimizer": {"type": "LookSAM", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 2}} | changes
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        code = main(["check", str(path), *arguments])
        return code, *capsys.readouterr()

    return run


def looksam(**params: Any) -> dict[str, Any]:
    return {"type": "LookSAM", "params": {"lr": 1e-3, **params}}


def value(table: str, row: str) -> str:
    return next(line.split(row)[1].strip() for line in table.splitlines() if line.strip().startswith(row))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_pass_without_a_warning(path, capsys):
    """With the parameters of a ViT-B/16, which the README trains with them."""
    assert main(["check", str(path), "--world-size", "4", "--params", "86.6e6"]) == 0
    captured = capsys.readouterr()
    assert not captured.err and "128 = " in captured.out
    warnings = [line for line in captured.out.splitlines() if line.startswith("warning:")]
    assert all("trains without LookSAM" in line for line in warnings)
    assert len(warnings) == path.stem.startswith("adamw")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "large-batch").glob("*.json")), ids=lambda path: path.stem)
def test_large_batch_recipes_pass_at_the_world_size_in_their_name(path, capsys):
    gpus = re.search(r"(\d+)gpu", path.stem)
    assert gpus is not None
    assert main(["check", str(path), "--world-size", gpus[1], "--params", "86e6"]) == 0
    out = capsys.readouterr().out
    assert f"x {gpus[1]} ranks" in out and "warning:" not in out


@pytest.mark.parametrize(("changes", "arguments", "words"), [
    ({"optimizer": looksam(k=0)}, (), "optimizer.params.k: Input should be greater than or equal to 1"),
    ({"optimizer": {"type": "LookSAMM", "params": {}}}, (), "Did you mean 'LookSAM'?"),
    ({"optimizer": {}}, (), "optimizer.type is missing"),
    ({"train_micro_batch_size_per_gpu": 3}, ("--world-size", "2"), "DeepSpeed refuses it at world size 2: "),
], ids=str)  # yapf: disable
def test_errors_are_told_and_exit_with_1(check, changes, arguments, words):
    """What is one: tests/configurations.py."""
    code, out, err = check(*arguments, **changes)
    assert code == 1 and not out and words in err


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[1]", "not a JSON object"),
                                             ('{"fp16": {"a": 1, "a": 2}, "k": 1, "k": 2}', "a appears twice"),
                                             ('{"fp16": {"a": 1, "a": 2}, "k": 1, "k": 2}', "k appears twice"),
                                             ('{"k": 1, "k": 2}', "optimizer.type is missing"),
                                             (None, "No such file")])
def test_files_that_are_no_configuration(tmp_path, capsys, text, words):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    assert main(["check", str(path)]) == 1
    assert words in capsys.readouterr().err


def test_batch_of_ranks_that_are_not_there(check):
    code, out, _ = check("--world-size", "64", train_batch_size=256, gradient_accumulation_steps=2)
    assert code == 0 and "256 = 2 a rank x 2 micro-batches x 64 ranks" in out


MIB = 2**20


@pytest.mark.parametrize(("stage", "extra", "sent"), [
    # 2^20 fp32 parameters, 4 ranks, 2 micro-batches; 3/4 of a payload of 4 MiB crosses the wire, 3 MiB.
    (0, {}, 2 * 3),            # all-reduce
    (1, {}, 2 * 3 + 3),        # and w + eps gathered
    (2, {}, 2 * 2 * 3 + 3),    # an all-reduce a micro-batch
    (3, {}, 2 * (3 + 2 * 3)),  # reduce-scatter and two gathers a micro-batch
    (1, {"communication_data_type": "bf16"}, 3 + 3),
    (2, {"bf16": {"enabled": True}}, (2 * 2 * 3 + 3) / 2),
], ids=str)  # yapf: disable
def test_bytes_sent(check, stage, extra, sent):
    _, out, _ = check("--world-size", "4", "--params", str(MIB), gradient_accumulation_steps=2,
                      zero_optimization={"stage": stage}, optimizer=looksam(k=4), **extra)
    assert value(out, "extra sent, SAM step") == f"{sent:.2f} MiB"
    assert value(out, "extra sent, on average") == f"{sent / 4:.2f} MiB"
    assert value(out, "evaluations per update").startswith("1.25 ")


@pytest.mark.parametrize(("stage", "ascent", "sent"), [
    # As above; what benchmarks/traffic.py counts is in docs/costs.md.
    (0, "rank", 2 * 3), (1, "rank", 2 * 3), (2, "rank", 2 * 2 * 3),
    (0, "micro_batch", 3 * 2 * 3), (1, "micro_batch", 3 * 2 * 3), (2, "micro_batch", 2 * 2 * 3),
    (0, "global_micro_batch", 3 * 2 * 3), (1, "global_micro_batch", 3 * 2 * 3 + 4 * 3),
    (2, "global_micro_batch", 2 * 2 * 3 + 4 * 3), (3, "global_micro_batch", 2 * (3 + 2 * 3)),
])
def test_bytes_sent_by_ascent_mode(check, stage, ascent, sent):
    _, out, _ = check("--world-size", "4", "--params", str(MIB), gradient_accumulation_steps=2,
                      zero_optimization={"stage": stage}, optimizer=looksam(ascent=ascent))
    assert value(out, "extra sent, SAM step") == f"{sent:.2f} MiB"


WIRE = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
"""What a rank sends in a ring, in units of (N - 1)/N of the payload."""


@pytest.mark.parametrize("stage", range(4))
def test_bytes_sent_are_those_that_were_counted(check, stage):
    """benchmarks/traffic.py holds its formulas against the collectives of real ranks."""
    from benchmarks.traffic import EVALUATION, PUBLICATION

    _, out, _ = check("--world-size", "4", "--params", str(MIB), zero_optimization={"stage": stage})
    payloads = [*EVALUATION[stage].items(), *PUBLICATION[stage].items()]
    assert value(out, "extra sent, SAM step") == f"{sum(WIRE[kind] * size for kind, size in payloads) * 3:.2f} MiB"


@pytest.mark.parametrize(("zero", "params", "expected"), [
    ({"stage": 0}, {}, ["4.00 MiB a rank, on the accelerator"] * 2 + ["8.00 MiB a rank, on the accelerator"]),
    ({"stage": 1}, {}, ["1.00 MiB a rank, on the accelerator"] * 2),
    ({"stage": 3}, {}, ["1.00 MiB a rank, on the accelerator"] * 3),
    ({"stage": 2}, {"v_dtype": "bf16"}, [f"{size} a rank, on the accelerator" for size in ("512.00 KiB", "1.00 MiB")]),
    ({"stage": 2}, {"ascent": "rank"},
     ["1.00 MiB a rank, on the accelerator"] * 2 + ["4.00 MiB a rank, on the accelerator"]),
    ({"stage": 2}, {"ascent": "micro_batch"},
     ["1.00 MiB a rank, on the accelerator"] * 2 + ["4.00 MiB a rank, on the accelerator"] * 2),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {},
     ["1.00 MiB a rank, in host memory (offload_optimizer)"] * 2),
], ids=str)  # yapf: disable
def test_memory(check, zero, params, expected):
    _, out, _ = check("--world-size", "4", "--params", str(MIB), zero_optimization=zero, optimizer=looksam(**params))
    lines = [line for line in out.splitlines() if "extra memory" in line]
    assert len(lines) == len(expected) and all(line.endswith(end) for line, end in zip(lines, expected, strict=True))


@pytest.mark.parametrize(("params", "extra", "words"), [
    ({"alpha": 0.7, "rho": 0.05}, {}, "alpha 0.7 and rho 0.05 fight"),
    ({"rho": 0.0}, {}, "rho 0:"),
    ({"k": 1, "alpha": 0.7, "rho": 1.0}, {}, "alpha is never used"),
    ({}, {"bf16": {"enabled": True}}, "rho 0.05 is small for bf16"),
    ({}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "rho 0.05 is small for bf16"),
    ({}, {"bf16": {"enabled": "auto"}}, "if the Trainer says bf16: rho 0.05 is small"),
    ({}, {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "fp16 at stage 0"),
    ({"layer_scale": "relative"}, {}, 'without "layerwise": true'),
    ({"alpha": 0.7, "rho": 0.5}, {"gradient_clipping": 1.0}, "from ‖g‖ = 0.819 on"),
    ({"alpha": "auto", "lr": "auto"}, {}, '"calibrated"'),
], ids=str)  # yapf: disable
def test_warnings(check, params, extra, words):
    code, out, _ = check("--params", "1e8", optimizer=looksam(**params), **extra)
    assert code == 0 and [line for line in out.splitlines() if line.startswith("warning:") and words in line]


@pytest.mark.parametrize(("params", "extra"), [
    ({}, {"gradient_clipping": 1.0}), ({"alpha": 0.7, "rho": 1.0}, {"gradient_clipping": 0.0}),
    ({"alpha": 0.2, "rho": 0.1}, {"gradient_clipping": 1.0}),
    ({"k": 1}, {}), ({"rho": 2.0}, {"bf16": {"enabled": True}}),
], ids=str)  # yapf: disable
def test_no_warning_without_a_reason(check, params, extra):
    assert "warning:" not in check("--params", "1e4", optimizer=looksam(**params), **extra)[1]


def test_placeholders_of_hugging_face_are_named_and_left_out(check):
    code, out, _ = check(train_batch_size="auto", train_micro_batch_size_per_gpu="auto", optimizer=looksam(lr="auto"))
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("note:")] == [
        "train_batch_size", "optimizer.params.lr", "train_micro_batch_size_per_gpu"]
    assert "warning:" not in out, "the default alpha is no placeholder"


def test_what_is_in_force_though_the_json_does_not_say_it(check):
    code, out, _ = check(optimizer={"type": "LookSAM", "params": {"base_optimizer": "SGD", "k": 1}})
    assert code == 0 and value(out, "gradient clipping").startswith("1 (DeepSpeed's default")
    assert value(out, "weight decay").startswith("0 (the default of SGD")
    assert value(out, "evaluations per update") == "2 (every update is a SAM step)"
    assert value(out, "extra sent").startswith("nothing by one rank")
    assert "warning: optimizer.params.lr is missing: SGD takes its own default, 0.001" in out
    _, out, _ = check(gradient_clipping=0.0, optimizer=looksam(weight_decay=0.1))
    assert "weight decay" not in out and value(out, "gradient clipping") == "off"


def test_keys_that_nobody_reads_are_told(check):
    _, out, _ = check(comment="ours")
    assert "note: comment: DeepSpeed knows no such key" in out


@pytest.mark.parametrize(("ascent", "m"), [("global", 96), ("rank", 24), ("micro_batch", 8),
                                           ("global_micro_batch", 32)])
def test_examples_per_perturbation(check, ascent, m):
    _, out, _ = check("--world-size", "4", train_batch_size=96, gradient_accumulation_steps=3,
                      optimizer=looksam(ascent=ascent))
    assert value(out, "examples per perturbation") == f'{m} ("ascent": "{ascent}")'


@pytest.mark.parametrize(("rho", "precision", "parameters", "words"), [
    (0.05, "fp32", 1e9, None), (0.4, "bf16", 86.6e6, None), (0.0, "bf16", 1e9, None),
    (0.05, "bf16", 86.6e6, "Use rho 0.36 or more"), (0.05, "bf16", 7e9, "compute in fp32"),
    (0.05, "fp16", 86.6e6, None), (0.002, "bf16", 1.3e6, "cosine of about 0.2"),
])  # yapf: disable
def test_rounding(rho, precision, parameters, words):
    """Cosines as docs/low-precision.md measured them, rounded; the last one in torch_autocast: 0.17."""
    warning = rounding_warning(rho, precision, int(parameters))
    assert warning is None if words is None else words in str(warning)


def test_report_names_versions_and_the_whole_support_table(capsys):
    assert main(["report"]) == 0
    out = capsys.readouterr().out
    assert value(out, "ds_looksam") == __version__
    for row in (*SUPPORTED, *REFUSED):
        assert row.feature in out
    assert "\x1b" not in out, "escape codes in a file"


HEADER = "split,epoch,update,evaluations,seconds,loss,accuracy,lr,images_per_second,step_kind\n"


def write_run(folder: Path, evaluations: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(HEADER + f"train,0.5,10,{evaluations // 2},30,2.0,0.3,0.001,50,base\n"
                                        f"test,1,20,{evaluations},60,1.5,0.5,0.001,,\n")
    return folder


def test_plot_draws_every_run(tmp_path, capsys):
    runs = [write_run(tmp_path / "a" / "looksam", 24), write_run(tmp_path / "a" / "adamw", 20),
            write_run(tmp_path / "b" / "adamw", 20)]  # two of one name
    png = tmp_path / "new" / "plot.png"
    assert main(["plot", *map(str, runs), "--out", str(png)]) == 0
    assert capsys.readouterr().out.strip() == str(png)
    three = image.imread(png)
    assert main(["plot", str(runs[0]), "--out", str(png)]) == 0
    one = image.imread(png)
    assert three.shape == one.shape and (three != one).any(), "a run was not drawn"


def test_axes_of_a_plot(tmp_path):
    first, _ = plot.read(write_run(tmp_path / "run", 24))
    assert {name: x(first) for name, x in plot.AXES.items()} == {
        "updates": 10, "gradient evaluations": 12, "minutes of training": 0.5}


@pytest.mark.parametrize(("content", "words"), [(None, "is not there"), ("", "has no rows"), (HEADER, "has no rows"),
                                                ("a,b\n1,2\n", "has no column accuracy")])
def test_plot_of_what_is_no_run(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "metrics.csv").write_text(content)
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("arguments", [[], ["chek"], ["check"], ["check", "x", "--world-size", "0"],
                                       ["check", "x", "--params", "1.5"], ["plot"]], ids=str)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage: ds-looksam" in capsys.readouterr().err


def test_as_a_program_in_a_pipe_and_in_a_terminal():
    command = [sys.executable, "-m", "ds_looksam", "check", str(ROOT / "configs" / "looksam_zero2.json")]
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert piped.returncode == 0 and piped.stdout.splitlines()[2].startswith("  optimizer  ")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as "| head" does
        assert b"rror" not in process.stderr.read()
    ours, its = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, stdout=its, stderr=its, env=os.environ | {"TERM": "xterm"}) as process:
        os.close(its)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # Linux: the last writer has closed its end
            pass
        os.close(ours)
    assert process.returncode == 0 and "│".encode() in shown
