"""The set-up files agree with each other, so that a fresh clone gets the versions that were tested."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


def test_the_wheel_holds_the_whole_package_with_its_types_and_works_without_the_source(tmp_path):
    source = tmp_path / "source"  # a build leaves folders beside what it builds
    shutil.copytree(ROOT / "ds_looksam", source / "ds_looksam", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-build-isolation", "--no-index",
                    "--target", str(tmp_path / "site"), str(source)], check=True, timeout=200)

    installed = tmp_path / "site" / "ds_looksam"
    wanted = {p.relative_to(source / "ds_looksam") for p in (source / "ds_looksam").rglob("*") if p.is_file()}
    assert wanted <= {p.relative_to(installed) for p in installed.rglob("*") if p.is_file()}
    assert Path("py.typed") in wanted

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "DS_ACCELERATOR": "cpu"}
    where = subprocess.run([sys.executable, "-c", "import ds_looksam; print(ds_looksam.__file__)"], cwd=tmp_path,
                           check=True, env=environment, capture_output=True, text=True, timeout=200).stdout
    assert str(installed) in where
