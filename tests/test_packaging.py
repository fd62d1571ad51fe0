"""The set-up files agree with each other, so that a fresh clone gets the versions that were tested."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier, SpecifierSet
from packaging.utils import canonicalize_name

from ds_looksam._versions import TESTED, __version__

ROOT = Path(__file__).parent.parent


def pins() -> dict[str, Specifier]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)) for r in requirements}


def test_every_pin_is_exact_and_fits_any_build_of_the_package():
    for name, pin in pins().items():
        assert pin.operator == "==", name
        assert "+" not in pin.version, f"{name}: a local version such as +cpu cannot be installed on other machines"


@pytest.mark.parametrize("package", TESTED)
def test_pins_lie_in_the_range_the_package_asks_for(package):
    assert SpecifierSet(TESTED[package]).contains(pins()[package].version)


def test_all_that_the_installed_package_asks_for_is_pinned():
    try:
        assert version("ds_looksam") == __version__
    except PackageNotFoundError:
        pytest.skip("running from the source tree, not installed")
    pinned = pins()
    for requirement in map(Requirement, requires("ds_looksam") or []):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("train", "test")):
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)].version), requirement
