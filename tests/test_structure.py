"""The house: packages at the top level, imports that point downward, one engine that has its parts."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from deepspeed.runtime.engine import DeepSpeedEngine

import ds_looksam
from ds_looksam.engines.host import HostEngine

PACKAGE = Path(ds_looksam.__file__).parent
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
