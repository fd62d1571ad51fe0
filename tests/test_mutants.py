"""The mutants of tests/mutants.py fit the sources and the tests as they are. What kills them, that program shows."""

from __future__ import annotations

from pathlib import Path

import ds_looksam

from .mutants import MUTANTS

PACKAGE = Path(ds_looksam.__file__).parent


def test_every_mutant_finds_its_line_and_its_tests() -> None:
    for mutant in MUTANTS:
        mutant.apply((PACKAGE / mutant.file).read_text())
        files = [word for word in mutant.tests.split() if word.endswith(".py")]
        assert files and all((Path(__file__).parent / file).is_file() for file in files), mutant.tests
    assert {m.file.partition("/")[0] for m in MUTANTS} >= {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
