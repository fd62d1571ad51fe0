"""torchrun, which keeps the exit code 75 of a program that was told to stop and has saved a checkpoint.

    python launch/elastic.py [torchrun's arguments] PROGRAM [its arguments]

To torchrun every exit code but 0 is a failure: it would end the other ranks, which may be saving still, and start all
of them again. So a rank that ends with 75 ends with 0 here, and leaves a note for the process that started it, which
then ends with 75 itself.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path

SAVED_TO_GO_ON = 75  # as in stopping.py, which imports torch: a program may have to set something before that
NOTES = "LOOKSAM_SAVED"
"""Names the folder of the notes to the ranks of this host."""


def start_ranks() -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import record

    args = run.parse_args(sys.argv[1:])
    if args.no_python or args.module:  # no file that a rank could run in its own process
        record(run.run)(args)
        return 0
    args.training_script_args.insert(0, args.training_script)
    args.training_script = __file__
    with tempfile.TemporaryDirectory(prefix="looksam-") as notes:
        os.environ[NOTES] = notes
        record(run.run)(args)
        return SAVED_TO_GO_ON if os.listdir(notes) else 0


def be_rank() -> None:
    note = Path(os.environ.pop(NOTES), os.environ["LOCAL_RANK"])
    note.unlink(missing_ok=True)  # of a rank that had saved while another one failed: all were started again
    del sys.argv[0]
    program = sys.argv[0]
    sys.path[0] = str(Path(program).parent)
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code != SAVED_TO_GO_ON:
            raise
        note.touch()


if __name__ == "__main__":
    if NOTES in os.environ:
        be_rank()
    else:
        sys.exit(start_ranks())
