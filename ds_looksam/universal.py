"""A universal checkpoint that a LookSAM run of any world size and of ZeRO stages 1 to 3 can load.

    python -m ds_looksam.universal CHECKPOINTS/global_step100 CHECKPOINTS/global_step100_universal

Runs DeepSpeed's own converter (``deepspeed.checkpoint.ds_to_universal``), puts LookSAM's files beside its result, and
adds what DeepSpeed 0.19's loaders ask for but its converter leaves out where the stage changes between 1-2 and 3. Then
load with ``"checkpoint": {"load_universal": true}`` in the JSON. The base optimizer must be of Adam's kind: the
converter knows no other state than ``exp_avg`` and ``exp_avg_sq``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import PARAM, PARAM_SHAPES, ds_to_universal

from .errors import LookSAMCheckpointError

STAGE_12_STATES = "mp_rank_00_model_states.pt"
STAGE_3_STATES = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def convert(source: Path, target: Path, workers: int = 1) -> None:
    """Convert one checkpoint (a ``global_step...`` folder). One process; not collective.

    Raises:
        FileExistsError: ``target`` exists; DeepSpeed's converter would leave stale parameters in it.
        LookSAMCheckpointError: there is no checkpoint of ZeRO stages 1 to 3 in ``source``.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it, or name another folder")
    if not any(source.glob("*_optim_states.pt")):
        raise LookSAMCheckpointError(
            f"{source} has no *_optim_states.pt, as checkpoints of ZeRO stages 1 to 3 have: there is nothing to "
            "convert. One of stage 0 loads at any world size as it is; at another stage load_checkpoint(..., "
            "load_module_only=True) takes its weights")
    # Apart, since the converter names its result in latest_universal before it is whole.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as apart:
        made = Path(apart) / target.name
        ds_to_universal.main(argparse.Namespace(
            input_folder=str(source), output_folder=str(made), num_extract_workers=workers, num_merge_workers=workers,
            keep_temp_folder=False, strict=True, inject_missing_state=True))
        for path in sorted(source.glob("looksam*")):
            shutil.copy2(path, made)
        _serve_every_stage(made)
        made.rename(target)
        (Path(apart) / "latest_universal").rename(target.absolute().parent / "latest_universal")


def _serve_every_stage(folder: Path) -> None:
    here, there = folder / STAGE_12_STATES, folder / STAGE_3_STATES
    from_stage_3 = there.exists()
    shutil.copy2(there if from_stage_3 else here, here if from_stage_3 else there)

    path = folder / "zero" / "optimizer_state.pt"
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    if from_stage_3:
        # Stages 1-2 read the version here, the step beside each parameter, and tensors in their shapes, in a dict.
        states = torch.load(there, map_location="cpu", mmap=True, weights_only=False)
        state.setdefault("ds_version", states["ds_version"])
        step = state["optimizer_state_dict"]["state"][0].get("step")
        for name, shape in (item for group in states[PARAM_SHAPES] for item in group.items()):
            for file in sorted((folder / "zero" / name).glob("*.pt")):
                flat = torch.load(file, weights_only=False)
                torch.save({PARAM: flat.view(shape)}, file)
            if step is not None:
                torch.save(step, folder / "zero" / name / "step.pt")
    else:
        # Stage 3 reads both here.
        steps = [torch.load(p, weights_only=False) for p in sorted((folder / "zero").rglob("step.pt"))[:1]]
        state["optimizer_state_dict"] = {"state": {0: {"step": steps[0]} if steps else {}},
                                         "param_groups": state["param_groups"]}
    torch.save(state, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ds_looksam.universal", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, CHECKPOINTS/global_step...")
    parser.add_argument("universal", type=Path, help="folder to make, beside it")
    parser.add_argument("--workers", type=int, default=1, help="processes to convert with")
    args = parser.parse_args()
    convert(args.checkpoint, args.universal, args.workers)


if __name__ == "__main__":
    main()
