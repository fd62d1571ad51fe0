#!/usr/bin/env bash
# All that wants a GPU, on one of them, without a network, within a budget: the tests marked gpu, step_time, and as many
# runs of benchmarks/evidence.py side by side as fit into what is left.
#
#     bash benchmarks/on_one_gpu.sh RESULTS [SECONDS [DATA_DIR]]      # 540 seconds; Fashion-MNIST's four IDX files
#
# RESULTS gets tests.log, step_time.md, evidence.log and evidence-gpu.jsonl; every run is there as soon as it is done.
# What benchmarks/results/evidence/evidence-gpu.jsonl has already is not run again. Settings, from the environment:
#   TESTS, TIMES    seconds for the first two parts (100 each; 0 leaves one out)
#   PROCESSES       runs side by side (14)
#   PLAN            evidence.py's plans, in this order (tune 5k batch text 60k)
#   STEP_TIME       arguments for step_time      EVIDENCE   more arguments for evidence.py
#   MPS=1           let the processes share the GPU through NVIDIA's MPS, where it can be started
set -u
cd "$(dirname "$0")/.."
results=$(mkdir -p "$1" && cd "$1" && pwd)
budget=${2:-540}
data=$(cd "${3:-/usr/share/datasets/fashion-mnist}" && pwd) || exit 1
SECONDS=0
tests=${TESTS:-100} times=${TIMES:-100}
export DS_ACCELERATOR=${DS_ACCELERATOR:-cuda} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/launch${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
failed=0

part() {  # part NAME SECONDS COMMAND...: its output to the file NAME, its end to the terminal
    local name=$1 seconds=$2 status
    shift 2
    # SIGINT: pytest then still prints what it has.
    timeout -s INT -k 10 "$seconds" "$@" >"$results/$name" 2>&1
    status=$?
    echo "== $name: exit code $status (124: its time was over), $SECONDS of $budget s are gone"
    tail -n "${SHOWN:-25}" "$results/$name"
    [ "$status" -eq 0 ] || failed=1
}

if [ "$tests" -gt 0 ]; then
    part tests.log "$tests" python3 -m pytest tests/test_gpu.py -m gpu -v --tb=short -p no:cacheprovider
fi
if [ "$times" -gt 0 ]; then
    # Twenty seconds are for the start; all contenders, the ascent modes too where step_time has them.
    part step_time.md "$times" python3 -m benchmarks.step_time --minutes "$(awk "BEGIN {print ($times - 30) / 60}")" \
        ${STEP_TIME:---model S/16 --image 224 --classes 1000 --precision bf16 --micro-batch 64 --stage 1 --rounds 30}
fi
if [ -n "${MPS:-}" ] && command -v nvidia-cuda-mps-control >/dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
    nvidia-cuda-mps-control -d
    trap 'echo quit | nvidia-cuda-mps-control' EXIT
    if timeout 30 python3 -c 'import torch; torch.ones(1).cuda().item()'; then
        echo "== MPS is on"
    else
        echo quit | nvidia-cuda-mps-control
        unset CUDA_MPS_PIPE_DIRECTORY
        trap - EXIT
        echo "== MPS cannot be used here: without it"
    fi
fi
cp -n benchmarks/results/evidence/evidence-gpu.jsonl "$results" 2>/dev/null
left=$((budget - SECONDS - 20))  # evidence.py gives its processes ten seconds to end, and has to end itself
if [ "$left" -gt 0 ]; then
    part evidence.log "$((left + 18))" python3 -m benchmarks.evidence run --plan ${PLAN:-tune 5k batch text 60k} \
        --processes "${PROCESSES:-14}" --seconds "$left" --data-dir "$data" --results "$results" \
        --file evidence-gpu.jsonl ${EVIDENCE:-}
fi
wc -l "$results"/*
exit "$failed"
