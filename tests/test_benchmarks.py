"""What docs/costs.md says is what the programs in benchmarks/ measure."""

from __future__ import annotations

from pathlib import Path

from benchmarks import traffic

PAGE = Path(__file__).parent.parent / "docs" / "costs.md"


def table_after(mark: str) -> str:
    """The page's table below the comment that names its program."""
    lines = PAGE.read_text().split(f"<!-- {mark} -->\n")[1].splitlines()
    return "\n".join(lines[:next(i for i, line in enumerate(lines) if not line.startswith("|"))])


def test_traffic() -> None:
    rows = [traffic.measure(stage, world=2, precision="bf16") for stage in traffic.STAGES]
    assert traffic.table(rows) == table_after("python -m benchmarks.traffic")
    for row in rows:
        assert {c.ranks for c in row.sam} == {2}
