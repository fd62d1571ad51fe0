"""Ranks that run different software say who differs, on every rank, before DeepSpeed has sent anything."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from ds_looksam import LookSAMVersionError, check_ranks
from ds_looksam.ranks import check as rank_check
from tests.ranks import run_on_ranks
from tests.training import Case, engine_for


def error_with_versions(odd_ranks: dict[int, dict[str, str]], through_engine: bool) -> tuple[str | None, int]:
    """On this rank: the message of the check, and how many broadcasts DeepSpeed had made before it."""
    versions = {**rank_check.rank_versions(), **odd_ranks.get(torch.distributed.get_rank(), {})}
    with mock.patch.object(rank_check, "rank_versions", lambda: versions), \
            mock.patch("deepspeed.comm.broadcast") as broadcast, \
            mock.patch("socket.gethostname", lambda: f"host-{torch.distributed.get_rank() // 2}"):
        try:
            if through_engine:
                with engine_for(Case(world=4)):
                    pass
            else:
                check_ranks()
        except LookSAMVersionError as error:
            return str(error), broadcast.call_count
    return None, broadcast.call_count


@pytest.mark.parametrize("package", ["ds_looksam", "deepspeed", "torch"])
def test_one_rank_that_differs_is_named_on_every_rank(package):
    messages = run_on_ranks(4, error_with_versions, {3: {package: "9.9.9"}}, False)
    for message, _ in messages:
        assert f"{package} 9.9.9 on rank 3 (host-1)" in message
        assert "on ranks 0-2 (host-0, host-1)" in message
        assert sum(name in message for name in ("ds_looksam ", "deepspeed ", "torch ")) == 1, message


def test_initialize_checks_before_deepspeed_sends_weights():
    for message, broadcasts in run_on_ranks(4, error_with_versions, {0: {"torch": "2.13.1"}}, True):
        assert message is not None and "torch 2.13.1 on rank 0 (host-0)" in message
        assert broadcasts == 0


def test_equal_versions_pass_with_one_small_all_reduce():
    assert [sizes for sizes in run_on_ranks(2, all_reduces_of_check)] == [[2], [2]]


def all_reduces_of_check() -> list[int]:
    all_reduce, sizes = torch.distributed.all_reduce, []

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with mock.patch("torch.distributed.all_reduce", counted), \
            mock.patch("torch.distributed.all_gather_object", side_effect=AssertionError("nothing differs")):
        check_ranks()
    return sizes


def test_a_changed_source_file_changes_the_version(tmp_path, monkeypatch):
    before = rank_check.sources_digest()
    for name in ("engine.py", "rank_check.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(rank_check, "__file__", str(tmp_path / "rank_check.py"))
    assert rank_check.sources_digest.__wrapped__() != before


def test_ranges():
    assert rank_check._ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
