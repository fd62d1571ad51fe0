"""The set-up files agree with each other, so that a fresh clone gets the versions that were tested. And the house:
packages at the top level, imports that point downward, one engine that has its parts."""

from __future__ import annotations

import ast
import email
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from packaging.requirements import Requirement
from packaging.specifiers import Specifier, SpecifierSet
from packaging.utils import canonicalize_name

import ds_looksam
from ds_looksam.engines.host import HostEngine
from ds_looksam.ranks import versions
from ds_looksam.ranks.versions import REQUIRED, TESTED, __version__

from .ranks import run_on_ranks

ROOT = Path(__file__).parent.parent
PACKAGE = Path(ds_looksam.__file__).parent


def pins() -> dict[str, Specifier]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)) for r in requirements}


def test_pins_are_exact_fit_any_build_and_are_tested_versions():
    pinned = pins()
    for name, pin in pinned.items():
        assert pin.operator == "==", name
        assert "+" not in pin.version, f"{name}: a local version such as +cpu cannot be installed on other machines"
    for ranges in REQUIRED, TESTED:
        assert all(SpecifierSet(wanted).contains(pinned[package].version) for package, wanted in ranges.items())


def test_files_say_what_the_package_asks_for_and_are_of_this_version():
    readme, citation = (ROOT / "README.md").read_text(), (ROOT / "CITATION.cff").read_text()
    assert all(f"`{package}{wanted}`" in readme for package, wanted in REQUIRED.items())
    assert f"\nversion: {__version__}\n" in citation
    date = re.search(r"^date-released: (\S+)$", citation, re.M)[1]
    assert f"\n## {__version__} - {date}\n" in (ROOT / "CHANGELOG.md").read_text()


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


@pytest.mark.parametrize(("package", "release", "tested"), [
    ("torch", "2.15.0", False), ("torch", "3.0.0+cu140", False), ("deepspeed", "0.19.9", False),
    ("torch", "2.11.0", True), ("torch", "2.14.1+cpu", True)])
def test_a_version_that_was_not_tested_is_warned_of_on_rank_0(monkeypatch, package, release, tested):
    said = imported_with(monkeypatch, **{package: release})
    assert len(said) == (not tested) and imported_with(monkeypatch, "1", **{package: release}) == []
    for message in said:
        assert f"{package} {release} (tested: {TESTED[package]})" in message and "-m ds_looksam verify" in message


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this source tree. Its metadata, and its files with their contents, are what is read of it."""
    if not (ROOT / "ds_looksam").is_dir():
        pytest.skip("an installed wheel is being tested, its source is not here")
    source = tmp_path_factory.mktemp("source")  # a build leaves folders beside what it builds
    shutil.copytree(ROOT / "ds_looksam", source / "ds_looksam", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    return next((source / "dist").glob("*.whl"))


def pip(command: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", command, "--no-deps", "--no-index", *arguments], check=True,
                   timeout=200)


def test_what_the_wheel_holds_and_says(wheel):
    """The whole package with its types and nothing else."""
    archive = zipfile.ZipFile(wheel)
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ds_looksam").rglob("*")
              if path.is_file() and "__pycache__" not in path.parts}
    assert {"ds_looksam/py.typed", "ds_looksam/shards/zero3.py", "ds_looksam/cli/__init__.py"} <= wanted
    assert {name for name in archive.namelist() if ".dist-info/" not in name} == wanted
    [path] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(path))
    assert (metadata["Name"], metadata["Version"]) == ("ds_looksam", __version__)
    assert metadata["License"] == "Apache-2.0" and any(name.endswith("/LICENSE") for name in archive.namelist())
    assert metadata.get_payload(decode=True).decode().startswith("# ds_looksam")
    declared = [c.rpartition(" ")[2] for c in metadata.get_all("Classifier") if re.search(r"Python :: 3\.\d", c)]
    assert declared and metadata["Requires-Python"] == f">={declared[0]}"
    required, pinned = [Requirement(line) for line in metadata.get_all("Requires-Dist")], pins()
    for r in required:
        if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("train", "test")):
            assert r.specifier.contains(pinned[canonicalize_name(r.name)].version), r
    requirements = {r.name: r.specifier for r in required if r.marker is None}
    assert {name: SpecifierSet(wanted) for name, wanted in REQUIRED.items()}.items() <= requirements.items()
    # What the package imports at the top of its modules is what it needs; optional things are imported where used.
    imported = {name for source in wanted if source.endswith(".py")
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
    pip("install", "--target", tmp_path / "site", wheel)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "DS_ACCELERATOR": "cpu"}
    script = tmp_path / "site" / "bin" / "ds-looksam"  # the console script that pip made
    shown = subprocess.run([sys.executable, "-v", script, "report"], cwd=tmp_path, check=True, env=environment,
                           capture_output=True, text=True, timeout=200)
    assert re.search(rf"ds_looksam +{re.escape(__version__)}", shown.stdout) and "Adagrad" in shown.stdout
    assert f"{tmp_path}/site/ds_looksam/cli" in shown.stderr


def test_rank_processes_test_the_same_package():
    [spec] = run_on_ranks(1, importlib.util.find_spec, "ds_looksam")
    assert spec.origin == ds_looksam.__file__


STOREYS = ["errors", "ranks", "arithmetic", "shards", "optimizers", "config", "replay", "step", "checkpoint", "engines",
           "reference", "universal", "cli", "__init__", "__main__"]
"""From the ground up: a module imports from its own storey and from those below."""


def imported(path: Path) -> set[str]:
    """The storeys that a file imports from."""
    package, found = path.relative_to(PACKAGE).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[:len(package) - (node.level - 1)], *(node.module.split(".") if node.module else [])]
            found |= {base[0]} if base else {alias.name for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(name.split(".")[0] == "ds_looksam" for name in names), f"{path}: use relative imports"
    return found


def test_imports_point_downward() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    upward = []
    for path in files:
        own = path.relative_to(PACKAGE)
        storey = STOREYS.index(own.parts[0].removesuffix(".py"))
        upward += [f"{own} imports {other}" for other in imported(path) if STOREYS.index(other) > storey]
    assert not upward


def test_the_top_level_can_be_read_at_a_glance() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 16, sorted(entries)


def test_one_engine_that_has_its_parts() -> None:
    """What the engine reads of itself under a private name, it has set itself."""
    assert ds_looksam.LookSAMEngine.__bases__ == (HostEngine, ) and HostEngine.__bases__ == (DeepSpeedEngine, )
    tree = ast.parse(inspect.getsource(ds_looksam.LookSAMEngine))
    of_self = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)
               and isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr.startswith("_")]
    own = {node.attr for node in of_self if isinstance(node.ctx, ast.Store)} | set(vars(ds_looksam.LookSAMEngine))
    assert {node.attr for node in of_self if isinstance(node.ctx, ast.Load)} <= own
