"""Subsets of a grid in which every combination of ``strength`` settings still occurs (greedy covering arrays)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest

Grid = dict[str, list[Any]]


def product(grid: Grid) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def covering(grid: Grid, strength: int, pairs: Collection[str] = (), candidates: int = 30, seed: int = 0,
             valid: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[dict[str, Any]]:
    """Rows of ``grid`` such that every choice of ``strength`` keys and of one value for each is in some row, of those
    that ``valid`` rows have; of the keys in ``pairs``, with each other and with the others, every choice of two.

    Greedy: each row starts from a combination not covered yet and takes the best of ``candidates`` random completions.
    The same arguments give the same rows.
    """
    draw = random.Random(seed)
    keys = list(grid)
    chosen = [*itertools.combinations([key for key in keys if key not in pairs], strength),
              *(two for two in itertools.combinations(keys, 2) if set(two) & set(pairs))]
    # A dict for its order: what is not covered yet.
    missing = dict.fromkeys(sorted(
        ((names, values) for names in chosen for values in itertools.product(*(grid[n] for n in names))), key=repr))
    rows = []
    while missing:
        names, values = next(iter(missing))
        best, best_covered = None, set()
        for _ in range(candidates):
            row = {key: draw.choice(grid[key]) for key in keys} | dict(zip(names, values, strict=True))
            row = {key: row[key] for key in keys}
            if not valid(row):
                continue
            covered = {(some, tuple(row[n] for n in some)) for some in chosen} & missing.keys()
            if len(covered) > len(best_covered):
                best, best_covered = row, covered
        if best is None:  # no valid row has them
            del missing[names, values]
            continue
        rows.append(best)
        for combination in best_covered:
            del missing[combination]
    return rows


def cases(grid: Grid, make: Callable[[dict[str, Any]], Any], strength: int = 2, pairs: Collection[str] = ()
          ) -> list[Any]:
    """pytest's parameters: ``make`` of each row of the whole grid. CI runs a covering subset of them, ``-m grid`` the
    others."""
    in_ci = {tuple(row.values()) for row in covering(grid, strength, pairs)}
    return [pytest.param(make(row), id="-".join(map(str, row.values())),
                         marks=[] if tuple(row.values()) in in_ci else pytest.mark.grid) for row in product(grid)]
