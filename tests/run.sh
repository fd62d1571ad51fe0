#!/usr/bin/env bash
# Everything that must hold: linter, types, tests. Sets up .venv itself. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

if [ ! -e "$DATASET" ]; then
    apt_install dataset-fashion-mnist || echo "Fashion-MNIST is not installed: tests that need it are skipped"
fi
# Launchers are tested on two hosts made of network namespaces, each with an sshd of its own. In a container only: where
# there is a systemd, installing a server would start it for the whole machine.
if [ ! -x /usr/sbin/sshd ] && [ ! -d /run/systemd/system ]; then
    apt_install openssh-server openssh-client iproute2 || echo "No openssh-server: tests of launchers are skipped"
fi

export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
compile_cpu_operators ShareMemCommBuilder FusedAdamBuilder CPUAdamBuilder
failed=0
run() {
    echo "+ $*"
    "$@" || failed=1
}
run ruff check .
run mypy
run python -m pytest "$@"
exit "$failed"
