"""The set-up files agree with each other, so that a fresh clone gets the versions that were tested."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier, SpecifierSet
from packaging.utils import canonicalize_name

from ds_looksam.ranks import versions
from ds_looksam.ranks.versions import REQUIRED, TESTED, __version__

from .ranks import run_on_ranks

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
def test_pins_are_tested_versions_in_the_range_the_package_asks_for(package):
    assert SpecifierSet(TESTED[package]).contains(pins()[package].version)
    assert SpecifierSet(REQUIRED[package]).contains(pins()[package].version)


@pytest.mark.parametrize("package", REQUIRED)
def test_readme_says_what_the_package_asks_for(package):
    assert f"`{package}{REQUIRED[package]}`" in (ROOT / "README.md").read_text()


def imported_with(monkeypatch, rank: str = "0", **installed: str) -> list[str]:
    """What ``import ds_looksam`` warns of with these versions installed."""
    monkeypatch.setattr(versions, "version", ({"deepspeed": "0.19.8", "torch": "2.13.0"} | installed).__getitem__)
    monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.check_versions()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("package", "release"),
                         [("torch", "2.10.1"), ("deepspeed", "0.19.7"), ("deepspeed", "0.20.0")])
def test_a_version_it_does_not_run_with_is_refused(monkeypatch, package, release):
    with pytest.raises(ImportError, match=f"does not run with {package} {release}: .*pip install") as caught:
        imported_with(monkeypatch, **{package: release})
    wanted = re.search(r'pip install "(.*)"', str(caught.value))[1]  # the way out
    fits = next(v for v in ("0.19.8", "2.13.0") if Requirement(wanted).specifier.contains(v))
    assert imported_with(monkeypatch, **{package: fits}) == []


@pytest.mark.parametrize(("package", "release"),
                         [("torch", "2.15.0"), ("torch", "3.0.0+cu140"), ("deepspeed", "0.19.9")])
def test_a_version_that_was_not_tested_is_warned_of_on_rank_0(monkeypatch, package, release):
    [message] = imported_with(monkeypatch, **{package: release})
    assert f"{package} {release} (tested: {TESTED[package]})" in message and "-m ds_looksam verify" in message
    assert imported_with(monkeypatch, "1", **{package: release}) == []


@pytest.mark.parametrize("release", ["2.11.0", "2.14.1", "2.14.1+cpu"])
def test_a_tested_version_says_nothing(monkeypatch, release):
    assert imported_with(monkeypatch, torch=release) == []


def test_all_that_the_installed_package_asks_for_is_pinned():
    try:
        assert version("ds_looksam") == __version__
    except PackageNotFoundError:
        pytest.skip("running from the source tree, not installed")
    pinned = pins()
    for requirement in map(Requirement, requires("ds_looksam") or []):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("train", "test")):
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)].version), requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this source tree. Its metadata, and its files with their contents, are what is read of it."""
    if not (ROOT / "ds_looksam").is_dir():
        pytest.skip("an installed wheel is being tested, its source is not here")
    source = tmp_path_factory.mktemp("source")  # a build leaves folders beside what it builds
    shutil.copytree(ROOT / "ds_looksam", source / "ds_looksam", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
                    "--wheel-dir", str(source / "dist"), str(source)], check=True, timeout=200)
    return next((source / "dist").glob("*.whl"))


def test_the_wheel_holds_the_whole_package_with_its_types_and_nothing_else(wheel):
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ds_looksam").rglob("*") if p.is_file()}
    wanted = {name for name in files if "__pycache__" not in name}
    assert {"ds_looksam/py.typed", "ds_looksam/shards/zero3.py", "ds_looksam/cli/__init__.py"} <= wanted
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_the_wheels_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    [path] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(path))
    assert (metadata["Name"], metadata["Version"]) == ("ds_looksam", __version__)
    assert metadata["License"] == "Apache-2.0" and any(name.endswith("/LICENSE") for name in archive.namelist())
    assert metadata.get_payload(decode=True).decode().startswith("# ds_looksam")
    declared = [c.rpartition(" ")[2] for c in metadata.get_all("Classifier") if re.search(r"Python :: 3\.\d", c)]
    assert declared and metadata["Requires-Python"] == f">={declared[0]}"
    requirements = {r.name: r for r in map(Requirement, metadata.get_all("Requires-Dist")) if r.marker is None}
    assert {name: SpecifierSet(wanted) for name, wanted in REQUIRED.items()} == {
        name: requirements[name].specifier for name in REQUIRED}
    # What the package imports at the top of its modules is what it needs; optional things are imported where used.
    imported = {name for source in archive.namelist() if source.startswith("ds_looksam/") and source.endswith(".py")
                for name in imports_at_the_top(archive.read(source))}
    # Triton comes with torch, where that is for GPUs; triton_passes.py is imported there only.
    assert imported - sys.stdlib_module_names - {"ds_looksam", "triton"} == set(requirements)


def imports_at_the_top(source: bytes) -> Iterator[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def test_the_wheel_works_without_the_source(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-index", "--target", str(site),
                    str(wheel)], check=True, timeout=200)
    environment = {**os.environ, "PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu"}
    script = [sys.executable, str(site / "bin" / "ds-looksam"), "report"]  # the console script that pip made
    shown = subprocess.run(script, cwd=tmp_path, check=True, env=environment, capture_output=True, text=True,
                           timeout=200).stdout
    assert re.search(rf"ds_looksam +{re.escape(__version__)}", shown) and "Adagrad" in shown
    where = subprocess.run([sys.executable, "-c", "import ds_looksam; print(ds_looksam.__file__)"], cwd=tmp_path,
                           check=True, env=environment, capture_output=True, text=True, timeout=200).stdout
    assert str(site) in where


def package_file() -> str:
    import ds_looksam

    return ds_looksam.__file__


def test_rank_processes_test_the_same_package():
    assert run_on_ranks(1, package_file) == [package_file()]


def test_the_citation_and_the_changelog_are_of_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    date = re.search(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert f"\n## {__version__} - {date}\n" in (ROOT / "CHANGELOG.md").read_text()
