"""The program that the launcher tests launch: trains a case, and every rank writes what it has at the end.

    python tests/launched.py --case CASE.pickle --out DIR
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from launch import distributed
from tests.training import engine_for, master_weights, train_window

SAVED_TO_GO_ON = 75
"""Exit code (EX_TEMPFAIL): a checkpoint was saved on a signal, and the job can be started again (launch/common.sh)."""
STOPS = signal.SIGTERM, signal.SIGUSR1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--die-at", type=int, help="update before which the last rank is killed, once")
    parser.add_argument("--hang", action="store_true", help="the others then hang as in a collective that cannot fail")
    parser.add_argument("--nobody-dies", action="store_true", help="they hang only")
    parser.add_argument("--checkpoints", type=Path, help="go on from the newest one; save after each update")
    parser.add_argument("--wait-at", type=int, nargs="*", default=[], help="updates that wait for a signal to save")
    parser.add_argument("--local_rank", type=int)
    return parser.parse_args()


def die_or_hang(args: argparse.Namespace, is_last: bool) -> None:
    died = args.out / "died"
    if is_last and not args.nobody_dies and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if args.hang:
        (args.out / "hanging").touch()
        time.sleep(3600)


def main() -> int:
    args = parse_arguments()
    signals: list[int] = []
    for number in STOPS if args.wait_at else ():
        signal.signal(number, lambda received, _: signals.append(received))
    case = pickle.loads(args.case.read_bytes())
    distributed.join()
    rank = dist.get_rank()
    assert dist.get_world_size() == case.world, f"{dist.get_world_size()} ranks, the case has {case.world}"
    with engine_for(case) as engine:
        started_at = 0
        if args.checkpoints and (args.checkpoints / "latest").exists():
            engine.load_checkpoint(str(args.checkpoints))
            started_at = engine.global_steps
        (args.out / f"started-at-{started_at}-rank-{rank}").touch()
        for update in range(started_at, case.updates):
            if update == args.die_at:
                die_or_hang(args, rank == case.world - 1)
            if update in args.wait_at and update != started_at:
                (args.out / f"waiting-at-{update}-rank-{rank}").touch()
                while not signals:
                    time.sleep(0.1)
                dist.barrier()
            if signals:
                for number in STOPS:
                    signal.signal(number, signal.SIG_IGN)  # Python restores the default handler when it ends
                return SAVED_TO_GO_ON
            train_window(engine, case, update)
            if args.checkpoints:
                engine.save_checkpoint(str(args.checkpoints))
        torch.save({"weights": master_weights(engine), "host": socket.gethostname(), "rank": rank,
                    "local_rank": os.environ["LOCAL_RANK"], "variable": os.environ.get("FROM_DEEPSPEED_ENV"),
                    "cores": sorted(os.sched_getaffinity(0))}, args.out / f"rank-{rank}.pt")
    return 0


if __name__ == "__main__":
    code = main()
    distributed.leave()
    sys.exit(code)
