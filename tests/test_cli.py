"""The command line: what it says about a configuration is what deepspeed.initialize would say, and what runs cost."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from ds_looksam.cli import main, plot
from ds_looksam.config.params import ASCENTS, OWN
from ds_looksam.config.rounding import rounding_warning
from ds_looksam.config.support import REFUSED
from ds_looksam.config.support_table import SUPPORTED
from ds_looksam.ranks.versions import __version__

ROOT = Path(__file__).parent.parent
MIB = 2**20


@pytest.fixture
def check(tmp_path, capsys):
    """Runs ``check`` on a working configuration with changes merged in; returns (exit code, stdout, stderr)."""

    def run(*arguments: str, **changes: Any) -> tuple[int, str, str]:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2}, "optimizer": looksam()}
                                   | changes))
        code = main(["check", str(path), *arguments])
        return code, *capsys.readouterr()

    return run


def looksam(**params: Any) -> dict[str, Any]:
    return {"type": "LookSAM", "params": {"lr": 1e-3, **params}}


def value(table: str, row: str) -> str:
    return next(line.split(row)[1].strip() for line in table.splitlines() if line.strip().startswith(row))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_pass_without_a_warning(path, capsys):
    """With the parameters of a ViT-B/16, which the README trains with them; recipes at the world size in their name."""
    gpus = re.search(r"(\d+)gpu", path.stem)
    world = gpus[1] if gpus is not None else "4"
    assert main(["check", str(path), "--world-size", world, "--params", "86.6e6"]) == 0
    captured = capsys.readouterr()
    assert not captured.err and f"x {world} ranks" in captured.out and (gpus is not None or "128 = " in captured.out)
    warnings = [line for line in captured.out.splitlines() if line.startswith("warning:")]
    assert all("trains without LookSAM" in line for line in warnings)
    assert len(warnings) == path.stem.startswith("adamw")


TWICE = '{"fp16": {"a": 1, "a": 2}, "k": 1, "k": 2}'


@pytest.mark.parametrize("text, words", [
    ("{", ["not JSON"]), ("[1]", ["not a JSON object"]), (None, ["No such file"]),
    (TWICE, ["a appears twice", "k appears twice", "optimizer.type is missing"]),
    ('{"train_batch_size": 8, "optimizer": {"type": "LookSAMM", "params": {}}}', ["Did you mean 'LookSAM'?"]),
    ('{"train_batch_size": 8, "optimizer": {"type": "LookSAM", "params": {"k": 0}}}',
     ["optimizer.params.k: Input should be greater than or equal to 1"]),
    ('{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3, "optimizer": {"type": "LookSAM", "params": {}}}',
     ["DeepSpeed refuses it at world size 2: "]),
])  # yapf: disable
def test_errors_are_told_and_exit_with_1(tmp_path, capsys, text, words):
    """What is one: tests/configurations.py."""
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    assert main(["check", str(path), "--world-size", "2"]) == 1
    out, err = capsys.readouterr()
    assert not out and all(word in err for word in words)


@pytest.mark.parametrize(("stage", "ascent", "extra", "sent"), [
    # 2^20 fp32 parameters, 4 ranks, 2 micro-batches; 3/4 of a payload of 4 MiB crosses the wire, 3 MiB.
    (0, "global", {}, 2 * 3),            # all-reduce
    (1, "global", {}, 2 * 3 + 3),        # and w + eps gathered
    (2, "global", {}, 2 * 2 * 3 + 3),    # an all-reduce a micro-batch
    (3, "global", {}, 2 * (3 + 2 * 3)),  # reduce-scatter and two gathers a micro-batch
    (1, "global", {"communication_data_type": "bf16"}, 3 + 3),
    (1, "global", {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, 2 * 3 + 3 / 2),
    (2, "global", {"bf16": {"enabled": True}}, (2 * 2 * 3 + 3) / 2),
    (2, "rank", {}, 2 * 2 * 3), (2, "micro_batch", {}, 2 * 2 * 3), (2, "global_micro_batch", {}, 2 * 2 * 3 + 4 * 3),
], ids=str)  # yapf: disable
def test_bytes_sent_and_examples_per_perturbation(check, stage, ascent, extra, sent):
    _, out, _ = check("--world-size", "4", "--params", str(MIB), train_batch_size=24, gradient_accumulation_steps=2,
                      zero_optimization={"stage": stage}, optimizer=looksam(k=4, ascent=ascent), **extra)
    assert value(out, "extra sent, SAM step") == f"{sent:.2f} MiB"
    assert value(out, "extra sent, on average") == f"{sent / 4:.2f} MiB"
    assert value(out, "evaluations per update").startswith("1.25 ")
    m = {"global": 24, "rank": 6, "micro_batch": 3, "global_micro_batch": 12}[ascent]
    assert value(out, "examples per perturbation") == f'{m} ("ascent": "{ascent}")'
    assert value(out, "batch of one update") == "24 = 3 a rank x 2 micro-batches x 4 ranks"


WIRE = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
"""What a rank sends in a ring, in units of (N - 1)/N of the payload."""


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize(("stage", "ascent"), [(stage, ascent) for stage in range(4) for ascent in ASCENTS
                                               if stage < 3 or ascent not in OWN])
def test_bytes_sent_are_those_that_were_counted(check, stage, ascent, accumulation):
    """benchmarks/traffic.py holds its formulas against the collectives of real ranks."""
    from benchmarks.traffic import sam_adds

    _, out, _ = check("--world-size", "4", "--params", str(MIB), train_batch_size=24,
                      gradient_accumulation_steps=accumulation, zero_optimization={"stage": stage},
                      optimizer=looksam(ascent=ascent))
    sent = sum(WIRE[kind] * size for kind, size in sam_adds(stage, accumulation, ascent).items()) * 3
    assert value(out, "extra sent, SAM step") == f"{sent:.2f} MiB"


@pytest.mark.parametrize(("zero", "params", "sizes"), [
    ({"stage": 0}, {}, "4.00 4.00 4.00"), ({"stage": 1}, {}, "1.00 1.00"), ({"stage": 3}, {}, "1.00 1.00"),
    ({"stage": 2}, {"v_dtype": "bf16"}, "0.50 1.00"), ({"stage": 2}, {"ascent": "rank"}, "1.00 1.00 4.00"),
    ({"stage": 2}, {"ascent": "micro_batch"}, "1.00 1.00 4.00 4.00"),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "1.00 1.00"),
], ids=str)  # yapf: disable
def test_memory(check, zero, params, sizes):
    _, out, _ = check("--world-size", "4", "--params", str(MIB), zero_optimization=zero, optimizer=looksam(**params))
    check_memory(out, zero, sizes)


def test_memory_of_stage_0_in_bf16(check):
    _, out, _ = check("--world-size", "4", "--params", str(MIB), zero_optimization={"stage": 0}, **BF16)
    check_memory(out, {}, "4.00 4.00 2.00")


def check_memory(out, zero, sizes):
    where = "in host memory (offload_optimizer)" if "offload_optimizer" in zero else "on the accelerator"
    expected = [f"{size} MiB a rank, {where}".replace("0.50 MiB", "512.00 KiB") for size in sizes.split()]
    lines = [line for line in out.splitlines() if "extra memory" in line]
    assert len(lines) == len(expected) and all(line.endswith(end) for line, end in zip(lines, expected, strict=True))


BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}


@pytest.mark.parametrize(("parameters", "params", "extra", "words"), [
    ("1e8", {"alpha": 0.7, "rho": 0.05}, {}, "alpha 0.7 and rho 0.05 fight"),
    ("1e8", {"rho": 0.0}, {}, "rho 0:"),
    ("1e8", {"k": 1, "alpha": 0.7, "rho": 1.0}, {}, "alpha is never used"),
    ("1e8", {}, BF16, "rho 0.05 is small for bf16"),
    ("1e8", {}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "rho 0.05 is small for bf16"),
    ("1e8", {}, {"bf16": {"enabled": "auto"}}, "if the Trainer says bf16: rho 0.05 is small"),
    ("1e8", {}, {**FP16, "zero_optimization": {"stage": 0}}, "fp16 at stage 0"),
    ("1e8", {"layer_scale": "relative"}, {}, 'without "layerwise": true'),
    ("1e8", {"alpha": 0.7, "rho": 0.5}, {"gradient_clipping": 1.0}, "from ‖g‖ = 0.819 on"),
    ("1e8", {"alpha": "auto", "lr": "auto"}, {}, '"calibrated"'),
    ("1e4", {}, {"gradient_clipping": 1.0}, None), ("1e4", {"k": 1}, {}, None), ("1e4", {"rho": 2.0}, BF16, None),
    ("1e4", {"alpha": 0.7, "rho": 1.0}, {"gradient_clipping": 0.0}, None),
    ("1e4", {"alpha": 0.2, "rho": 0.1}, {"gradient_clipping": 1.0}, None),
], ids=str)  # yapf: disable
def test_warnings(check, parameters, params, extra, words):
    """``words``: None where there is no reason for one."""
    code, out, _ = check("--params", parameters, optimizer=looksam(**params), **extra)
    warnings = [line for line in out.splitlines() if line.startswith("warning:")]
    assert code == 0 and (not warnings if words is None else any(words in line for line in warnings))


def test_notes(check):
    """Placeholders of Hugging Face's are named and left out, and keys that nobody reads are told."""
    code, out, _ = check(train_batch_size="auto", train_micro_batch_size_per_gpu="auto", optimizer=looksam(lr="auto"),
                         comment="ours")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("note:")] == [
        "train_batch_size", "optimizer.params.lr", "train_micro_batch_size_per_gpu", "comment:"]
    assert "note: comment: DeepSpeed knows no such key" in out
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


@pytest.mark.parametrize(("rho", "precision", "parameters", "words"), [
    (0.05, "fp32", 1e9, None), (0.4, "bf16", 86.6e6, None), (0.0, "bf16", 1e9, None),
    (0.05, "bf16", 86.6e6, "Use rho 0.36 or more"), (0.05, "bf16", 7e9, "compute in fp32"),
    (0.05, "fp16", 86.6e6, None), (0.002, "bf16", 1.3e6, "cosine of about 0.2"),
    (0.05, "bf16", 1.63e6, None), (0.05, "bf16", 1.65e6, "Use rho 0.05 or more"),  # README: 1.6 million
])  # yapf: disable
def test_rounding(rho, precision, parameters, words):
    """Cosines as docs/low-precision.md measured them, rounded; the last one in torch_autocast: 0.17."""
    warning = rounding_warning(rho, precision, int(parameters))
    assert warning is None if words is None else words in str(warning)


def test_report_names_versions_and_the_whole_support_table(capsys):
    assert main(["report"]) == 0
    out = capsys.readouterr().out
    assert value(out, "ds_looksam") == __version__
    assert all(row.feature in out for row in (*SUPPORTED, *REFUSED))
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
    assert {name: x(plot.read(runs[0])[0]) for name, x in plot.AXES.items()} == {
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


def forked(arguments: list[str], stdout: int, stderr: Path) -> int:
    """A process that runs the command, forked: what takes longest of it is to import DeepSpeed."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(stdout, 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), stderr.open("w")
            end = main(arguments)
            sys.stderr.flush()
            sys.stdout.flush()  # as the interpreter does when it ends
            code = end
        finally:
            os._exit(code)  # nothing of pytest's may run here
    os.close(stdout)
    return child


def test_in_a_pipe_and_in_a_terminal(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    arguments = ["check", str(ROOT / "configs" / "looksam_zero2.json")]
    assert main(arguments) == 0 and capsys.readouterr().out.splitlines()[2].startswith("  optimizer  ")
    ours, its = os.pipe()
    os.close(ours)  # as "| head" does
    assert os.waitstatus_to_exitcode(os.waitpid(forked(arguments, its, tmp_path / "stderr"), 0)[1]) == 1
    assert (tmp_path / "stderr").read_text() == ""
    ours, its = pty.openpty()
    child, shown = forked(arguments, its, tmp_path / "stderr"), b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux: the last writer has closed its end
        pass
    os.close(ours)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and "│".encode() in shown
