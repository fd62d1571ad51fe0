"""The package's version, and the versions of DeepSpeed and torch it needs and was tested with."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

__version__ = "0.2.0"

REQUIRED = {"deepspeed": ">=0.19.8,<0.20", "torch": ">=2.11"}
"""Also the requirements in setup.py. LookSAM reads DeepSpeed's private attributes: another minor release may differ in
what it computes, without an error. Of torch it uses public names, so a newer one is worth trying."""
TESTED = {"deepspeed": "==0.19.8", "torch": ">=2.11,<2.15"}
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def check_versions() -> None:
    """Raise ImportError, naming the way out, for a version that LookSAM does not run with; warn, on rank 0, of one that
    it was not tested with."""
    installed = {package: version(package) for package in REQUIRED}
    for package, wanted in REQUIRED.items():
        if not inside(installed[package], wanted):
            raise ImportError(f"ds_looksam {__version__} does not run with {package} {installed[package]}: it needs "
                              f"{package}{wanted}. Install that: pip install \"{package}{wanted}\"")
    untested = [f"{package} {installed[package]} (tested: {tested})" for package, tested in TESTED.items()
                if not inside(installed[package], tested)]
    if untested and next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0":
        warnings.warn(f"ds_looksam {__version__} was not tested with {', '.join(untested)}. To see in a minute or two "
                      "whether it is right on this machine: torchrun --standalone --nproc-per-node 2 -m ds_looksam "
                      "verify", stacklevel=3)


def inside(installed: str, wanted: str) -> bool:
    return SpecifierSet(wanted).contains(installed, prereleases=True)
