"""Tables: drawn by rich where a terminal is, as plain aligned text in a file or a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(title: str, rows: Sequence[Sequence[str]], headers: Sequence[str] = ()) -> None:
    """``rows`` and ``headers`` have the same number of columns. Without a terminal no line is wrapped."""
    console = Console()
    if console.is_terminal:
        table = Table(*map(escape, headers), title=escape(title), title_justify="left", show_header=bool(headers))
        for _ in rows[0] if rows and not headers else ():
            table.add_column()
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        return
    lines = [list(headers), *map(list, rows)] if headers else list(map(list, rows))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
