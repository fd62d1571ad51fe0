"""A job of two ranks whose DeepSpeed JSON switches on the monitor of a tracking service. See tests/test_trackers.py.

    torchrun --standalone --nproc-per-node 2 tests/tracker_job.py wandb
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

TRACKERS: dict[str, dict[str, Any]] = {
    "wandb": {"enabled": True, "project": "looksam"},
    # By default one value in a hundred samples is kept.
    "comet": {"enabled": True, "project": "looksam", "online": False, "samples_log_interval": 1},
}


def main(tracker: str) -> None:
    """Rank 0 prints, after each update, the samples so far and what ``engine.looksam`` says."""
    import deepspeed

    from launch import distributed
    from tests.training import Case, engine_for, train_window

    deepspeed.init_distributed("gloo", verbose=False)
    case = Case(world=2, accumulation=2, updates=5, k=2, base="SGD", config={tracker: TRACKERS[tracker]})
    said = []
    with engine_for(case) as engine:
        for update in range(case.updates):
            train_window(engine, case, update)
            said.append((engine.global_samples, engine.looksam.as_dict()))
    if torch.distributed.get_rank() == 0:
        print("said:", json.dumps(said))
    distributed.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
