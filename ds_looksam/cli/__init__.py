"""The command line: ``python -m ds_looksam`` and ``ds-looksam``. One file per subcommand."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ..errors import LookSAMError
from ..ranks.versions import __version__
from . import check, plot, report, verify

EPILOG = """examples:
  ds-looksam report
  ds-looksam check configs/looksam_zero2_bf16.json --world-size 64 --params 86e6
  ds-looksam plot runs/looksam runs/adamw --out compared.png
  torchrun --nproc-per-node 2 -m ds_looksam verify
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0, 1 after an error message, 2 for wrong arguments."""
    arguments = vars(_parser().parse_args(argv))
    module, _ = arguments.pop("module"), arguments.pop("local_rank")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its lines go to stdout, between ours
    try:
        code = module.run(**arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # "ds-looksam report | head": the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains
        return 1
    except (LookSAMError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ds-looksam", description="LookSAM for DeepSpeed, from the command line.",
                                     epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"ds_looksam {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(module: ModuleType, help: str) -> argparse.ArgumentParser:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=help, description=module.__doc__, formatter_class=raw)
        command.set_defaults(module=module)  # its run() gets the arguments below
        return command

    add(report, "versions, this machine, and what is supported")
    command = add(check, "validate a DeepSpeed JSON without starting anything")
    command.add_argument("config", type=Path, metavar="CONFIG.json", help="what deepspeed.initialize(config=...) gets")
    command.add_argument("--world-size", type=_positive, default=1, metavar="N", help="data-parallel ranks (default 1)")
    command.add_argument("--params", type=_positive, metavar="N",
                         help="trained parameters of the model, 86e6 say: bytes and memory are then told as numbers")
    command = add(plot, "draw runs of launch/train.py side by side, as a PNG")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="a folder with metrics.csv, or the file")
    command.add_argument("--out", type=Path, default=Path("runs.png"), metavar="PNG", help="default: runs.png")
    command = add(verify, "train tiny models here, and compare them with the plain algorithm")
    command.add_argument("--config", type=Path, metavar="CONFIG.json", help="check this very JSON, with a small model")
    command.add_argument("--json", action="store_true", dest="as_json", help="the result as JSON on stdout")
    command.add_argument("--quick", action="store_true", help="fp32 and bf16 on each stage, and "
                         "the ascent modes of stages 1 and 3 in fp32")
    command.add_argument("--only", default="", metavar="REGEX", type=_regex,
                         help="cases with such a name, 'stage 3' say")
    command.add_argument("--folder", type=Path, metavar="DIR", help="where all ranks see files (default: the system's "
                         "temporary folder)")
    return parser


def _positive(text: str) -> int:
    """A whole number above 0; 86e6 is one."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(value)
