# shellcheck shell=bash
# Sets up .venv once and enters it. Shared by launch/quickstart.sh and tests/run.sh, which source it from the root of
# the repository. What is installed is pinned in constraints.txt; where it comes from is the machine's own pip settings.
#
#   PYTHON=python3.12 bash launch/quickstart.sh    another interpreter (3.11 or newer)

PYTHON=${PYTHON:-python3}
VENV=${LOOKSAM_VENV:-$PWD/.venv}
# What is installed, beside its requirements: tests/run_wheel.sh names a wheel.
INSTALL=${LOOKSAM_INSTALL:---editable .}
# shellcheck disable=SC2034  # for those that source this file
DATASET=/usr/share/datasets/fashion-mnist  # Debian's package dataset-fashion-mnist

fail() { echo "error: $*" >&2; exit 1; }

may_apt() { [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; }

# apt_install PACKAGE...: as root on Debian, otherwise returns 1
apt_install() {
    may_apt || return 1
    echo "Installing Debian packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "$@" > /dev/null 2>&1 ||
        { apt-get update -qq > /dev/null && apt-get install -y -qq --no-install-recommends "$@" > /dev/null; }
}

# What an interpreter needs beside itself: venv with pip, and headers for the C++ operators DeepSpeed compiles.
python_lacks() {
    "$PYTHON" - << 'PY'
import importlib.util, os, sysconfig
if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
    print("python3-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python3-dev")
PY
}

install_into_venv() {
    local missing pip
    command -v "$PYTHON" > /dev/null || fail "$PYTHON not found; Debian: apt-get install python3"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" -V); choose one with PYTHON=python3.12"
    missing=$(python_lacks)
    command -v g++ > /dev/null || missing="$missing g++"
    if [ -n "$missing" ]; then
        # shellcheck disable=SC2086  # a list of package names
        apt_install $missing || fail "missing, ask for: apt-get install" $missing
        missing=$(python_lacks)
        [ -z "$missing" ] || fail "$PYTHON has no venv, pip or headers of its own; choose another with PYTHON=..."
    fi

    echo "Setting up $VENV: PyTorch, DeepSpeed and what training and tests need (some minutes, once)"
    "$PYTHON" -m venv --clear "$VENV"
    local pip=("$VENV/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt)
    "${pip[@]}" setuptools wheel numpy torch
    # DeepSpeed is a source package whose build looks at the installed torch.
    "${pip[@]}" --no-build-isolation deepspeed
    # shellcheck disable=SC2086  # --editable and a path, or a wheel
    "${pip[@]}" --no-build-isolation $INSTALL"[train,test]"
}

# compile_cpu_operators BUILDER...: DeepSpeed would do it at first use, on all ranks at once. There a killed rank leaves a
# lock that later ones wait for without an end, and a compiler's error is lost among the others' output.
compile_cpu_operators() {
    local builder log
    for builder in "$@"; do
        log=$VENV/$builder.log
        [ ! -e "$log" ] || continue
        echo "Compiling DeepSpeed's $builder (once)"
        rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
        python -c "from deepspeed.ops.op_builder.cpu import $builder; $builder().load()" > "$log.failed" 2>&1 ||
            { tail -n 20 "$log.failed" >&2; fail "$builder did not compile, see $log.failed"; }
        mv "$log.failed" "$log"
    done
}

# With the folder's own name in it: a virtual environment does not work after it was moved.
wanted=$(echo "$VENV" | cat - constraints.txt setup.py ds_looksam/ranks/versions.py | sha256sum)
if [ "$(cat "$VENV/installed" 2> /dev/null)" != "$wanted" ] || ! "$VENV/bin/python" -c '' 2> /dev/null; then
    install_into_venv
    echo "$wanted" > "$VENV/installed"
fi

export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
export TORCH_EXTENSIONS_DIR=$VENV/torch_extensions
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu
fi
