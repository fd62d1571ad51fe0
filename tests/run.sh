#!/usr/bin/env bash
# Everything that must hold: linter, types, tests. Sets up .venv itself. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

if [ ! -e "$DATASET" ]; then
    apt_install dataset-fashion-mnist || echo "Fashion-MNIST is not installed: tests that need it are skipped"
fi

export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
failed=0
run() {
    echo "+ $*"
    "$@" || failed=1
}
run ruff check .
run mypy
run python -m pytest "$@"
exit "$failed"
