#!/usr/bin/env bash
# The tests against the installed wheel: it is built as pip builds it for a user, installed with its requirements into an
# empty environment, and tested from a copy of the repository without the package's source. In a temporary folder.
#
#   bash tests/run_wheel.sh                                       configuration, oracle, checkpoints, command line, docs
#   PYTHON=python3.13 bash tests/run_wheel.sh tests/test_cli.py   another interpreter; arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/checkout"
# What git would commit: builds leave folders that setuptools would pick up again.
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --ignore-failed-read -c | tar -x -C "$work/checkout"
"${PYTHON:-python3}" -m pip wheel -q --no-deps --wheel-dir "$work" "$work/checkout"
LOOKSAM_VENV=$work/venv LOOKSAM_INSTALL=$(echo "$work"/*.whl)
. launch/environment.sh

cd "$work/checkout"
rm -r ds_looksam build ./*.egg-info
unset PYTHONPATH
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= LOOKSAM_TEST_INSTALLED=1
compile_cpu_operators ShareMemCommBuilder FusedAdamBuilder
[ $# -gt 0 ] || set -- tests/test_{config,configs,oracle_grid,checkpoint,checkpoint_moves,cli,docs,metrics,packaging}.py
python -m pytest "$@"
