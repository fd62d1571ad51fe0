"""Ranks that run different software say who differs, on every rank, before DeepSpeed has sent anything."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from ds_looksam import LookSAMVersionError, check_ranks
from ds_looksam.ranks import check as rank_check
from tests.ranks import run_on_ranks
from tests.training import Case, engine_for


def errors(odd_rank: int, packages: list[str], through_engine: bool) -> list[tuple[str, int]]:
    """On this rank, for each package that ``odd_rank`` has another version of: the message of the check, and how many
    broadcasts DeepSpeed had made before it."""
    rank, told = torch.distributed.get_rank(), []
    for package in packages:
        versions = {**rank_check.rank_versions(), **({package: "9.9.9"} if rank == odd_rank else {})}
        with mock.patch.object(rank_check, "rank_versions", lambda versions=versions: versions), \
                mock.patch("deepspeed.comm.broadcast") as broadcast, \
                mock.patch("socket.gethostname", lambda: f"host-{rank // 2}"), \
                pytest.raises(LookSAMVersionError) as error:
            if through_engine:
                with engine_for(Case(world=4)):
                    pass
            else:
                check_ranks()
        told.append((str(error.value), broadcast.call_count))
    return told


def test_one_rank_that_differs_is_named_on_every_rank():
    packages = ["ds_looksam", "deepspeed", "torch"]
    for on_rank in run_on_ranks(4, errors, 3, packages, False):
        for package, (message, _) in zip(packages, on_rank, strict=True):
            assert f"{package} 9.9.9 on rank 3 (host-1)" in message
            assert "on ranks 0-2 (host-0, host-1)" in message
            assert sum(f"{name} " in message for name in packages) == 1, message


def test_initialize_checks_before_deepspeed_sends_weights():
    for ((message, broadcasts), ) in run_on_ranks(4, errors, 0, ["torch"], True):
        assert "torch 9.9.9 on rank 0 (host-0)" in message
        assert broadcasts == 0


def test_before_initialize_each_rank_sends_from_its_own_gpu(monkeypatch):
    """NCCL refuses another one, and the current one is the first everywhere until DeepSpeed's engine is built."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with mock.patch("deepspeed.get_accelerator") as accelerator:
        accelerator.return_value.device_name = "cuda:{}".format
        accelerator.return_value.current_device_name = lambda: "cuda:0"
        assert rank_check.own_device() == torch.device("cuda:1")
        monkeypatch.delenv("LOCAL_RANK")
        assert rank_check.own_device() == torch.device("cuda:0")


def all_reduces_of_check() -> list[int]:
    all_reduce, sizes = torch.distributed.all_reduce, []

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with mock.patch("torch.distributed.all_reduce", counted), \
            mock.patch("torch.distributed.all_gather_object", side_effect=AssertionError("nothing differs")):
        check_ranks()
    return sizes


def test_equal_versions_pass_with_one_small_all_reduce():
    assert run_on_ranks(2, all_reduces_of_check) == [[2], [2]]


def test_a_changed_source_file_changes_the_version(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_check, "__file__", str(tmp_path / "ranks" / "check.py"))
    digests = []
    for line in ("x = 1", "x = 1", "x = 2"):
        (tmp_path / "engine.py").write_text(line)
        digests.append(rank_check.sources_digest.__wrapped__())
    assert digests[0] == digests[1] != digests[2]


def test_ranges():
    assert rank_check._ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
