"""Tests of one world size run together, so that its rank processes are started once."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Tests send both signals. What ``nohup`` has started, or a script in its background, ignores them, and so do its
    children."""
    for number, handler in (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_report_header() -> str:
    """Say which package is tested. tests/run_wheel.sh wants the installed one, which a source tree would hide."""
    spec = importlib.util.find_spec("ds_looksam")
    where = spec.origin if spec and spec.origin else "not found"
    if os.environ.get("LOOKSAM_TEST_INSTALLED") and "site-packages" not in Path(where).parts:
        raise pytest.UsageError(f"the installed ds_looksam is to be tested, but what is imported is {where}")
    return f"ds_looksam: {where}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def world(item: pytest.Item) -> int:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        return getattr(case, "world", 0)

    gc.freeze()  # as in tests/ranks.py: collections need not look at all that was imported
    items.sort(key=world)  # stable: the order inside a world size stays that of the files
