"""Tests of one world size run together, so that its rank processes are started once."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def world(item: pytest.Item) -> int:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        return getattr(case, "world", 0)

    items.sort(key=world)  # stable: the order inside a world size stays that of the files
