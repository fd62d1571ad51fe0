"""Joining the other processes, however they were launched: alone, torchrun, deepspeed, mpirun."""

from __future__ import annotations

import gc
import importlib.util
import os
import socket

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which its default arguments would keep
from deepspeed.accelerator import get_accelerator
from torch import Tensor

MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")  # Open MPI, MPICH's Hydra, PMIx under Slurm


def join() -> None:
    """Initialise the process group. Collective.

    torchrun and deepspeed say in the environment who is who; under mpirun DeepSpeed asks mpi4py; a process that was
    launched alone is a group of one.

    Raises:
        ModuleNotFoundError: launched by mpirun, but there is no mpi4py.
    """
    if "RANK" not in os.environ:
        if any(name in os.environ for name in MPI_VARIABLES):
            if importlib.util.find_spec("mpi4py") is None:
                raise ModuleNotFoundError("launched by MPI, but mpi4py is not installed: pip install mpi4py")
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    deepspeed.init_distributed(distributed_port=int(os.environ.get("MASTER_PORT", "29500")), verbose=False)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def leave() -> None:
    """Take the process group down, with all its threads, so that they are gone before the interpreter is.

    A thread of gloo's that still holds a tensor of a finished operation needs the interpreter to let go of it, and
    aborts the process ("terminate called without an active exception") where that is being taken down. DeepSpeed has
    references to the group, which keep it alive after ``torch.distributed.destroy_process_group``.
    """
    if dist.is_initialized():
        (deepspeed.comm if deepspeed.comm.is_initialized() else dist).destroy_process_group()
        gc.collect()


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def summed(values: Tensor) -> list[float]:
    """The sums over all ranks, on the host. Collective."""
    dist.all_reduce(values)
    return values.tolist()
