"""The package's version, and the versions of DeepSpeed and torch it was tested with."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

__version__ = "0.1.0"

TESTED = {"deepspeed": ">=0.19.8,<0.20", "torch": ">=2.11,<2.14"}
"""Also the requirements in setup.py. LookSAM reads DeepSpeed's private attributes: another minor release may differ."""


def check_versions() -> None:
    """Raise ImportError, naming the way out, if an installed version is outside the tested range."""
    for package, wanted in TESTED.items():
        installed = version(package)
        if not SpecifierSet(wanted).contains(installed, prereleases=True):
            raise ImportError(f"ds_looksam {__version__} was tested with {package}{wanted}, but {package} {installed} "
                              f"is installed. Install a tested one: pip install \"{package}{wanted}\"")
