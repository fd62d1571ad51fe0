"""Versions, what this machine has, and what LookSAM supports: the part of a bug report that machines can write.

"supported" means compared with an independent implementation of the algorithm by the tests that are named; what is
refused raises at deepspeed.initialize and names the way out.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from deepspeed.accelerator import get_accelerator

from ..config.params import OPTIMIZER_TYPES
from ..config.support import REFUSED
from ..config.support_table import SUPPORTED
from ..optimizers import LAYERWISE_OPTIMIZERS
from ..ranks.versions import TESTED, __version__, inside
from .output import print_table

OPTIONAL = {
    "transformers": "Hugging Face Trainer, the Vision Transformers of launch/train.py",
    "accelerate": "Hugging Face Trainer and Accelerate",
    "lightning": "PyTorch Lightning's DeepSpeed strategy",
    "mpi4py": "ranks found through MPI",
    "matplotlib": "ds-looksam plot",
}


def run() -> int:
    print_table("Versions", list(_versions()))
    print_table("This machine", list(_machine()))
    print_table("Optional packages", [(name, _installed(name) or "not installed", use)
                                      for name, use in OPTIONAL.items()])
    print_table("Optimizer types registered with DeepSpeed", [
        *((name, "around any supported base optimizer") for name in OPTIMIZER_TYPES),
        *((name, "alone, on ZeRO shards") for name in LAYERWISE_OPTIMIZERS)])
    print_table("Supported", [(", ".join(map(str, row.stages)), ", ".join(row.precisions),
                               "yes" if row.offload else "", row.feature) for row in SUPPORTED],
                ("ZeRO stage", "precision", "with offload", "feature"))  # the widest last: plain text is not wrapped
    print_table("Refused at deepspeed.initialize", [(row.feature, row.instead) for row in REFUSED],
                ("feature", "use instead"))
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    yield "ds_looksam", __version__
    for package, tested in TESTED.items():
        installed = version(package)
        yield package, f"{installed} ({'tested' if inside(installed, tested) else 'NOT TESTED'}: {tested})"
    yield "Python", platform.python_version()


def _machine() -> Iterator[tuple[str, str]]:
    accelerator = get_accelerator()
    name = accelerator.device_name()
    yield "system", f"{platform.system()} {platform.machine()}"
    yield "accelerator", f"{name} ({accelerator.communication_backend_name()} between ranks)"
    if name == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(accelerator.device_count())]
        yield "devices", ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)) or "none"
    for precision, supported in ("bf16", accelerator.is_bf16_supported()), ("fp16", accelerator.is_fp16_supported()):
        yield precision, f"{'supported' if supported else 'not supported'}, says DeepSpeed's accelerator"
    compilers = [compiler for compiler in ("c++", "nvcc") if shutil.which(compiler)]
    note = 'DeepSpeed compiles its own optimizers with them; without, use "torch_adam": true'
    yield "compilers", f"{', '.join(compilers) or 'none'} ({note})"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
