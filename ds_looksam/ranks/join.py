"""Joining the other processes, however they were launched: alone, by torchrun, deepspeed or MPI."""

from __future__ import annotations

import datetime
import importlib.util
import os
import socket

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout

from ..errors import LookSAMConfigError

_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")  # Open MPI, MPICH's Hydra, PMIx under Slurm


def join(timeout: datetime.timedelta = default_pg_timeout) -> None:
    """Initialise the process group. Collective.

    torchrun and deepspeed say in the environment who is who; under mpirun DeepSpeed asks mpi4py; a process that was
    launched alone is a group of one.

    Raises:
        LookSAMConfigError: launched by MPI, but there is no mpi4py.
    """
    if "RANK" not in os.environ:
        if any(name in os.environ for name in _MPI_VARIABLES):
            if importlib.util.find_spec("mpi4py") is None:
                raise LookSAMConfigError("launched by MPI, but mpi4py is not installed: pip install mpi4py")
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deepspeed.init_distributed(distributed_port=int(os.environ.get("MASTER_PORT", "29500")), verbose=False,
                               timeout=timeout)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
