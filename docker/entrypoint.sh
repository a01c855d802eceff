#!/usr/bin/env bash
# The container's command. Without arguments, or with flags or a model, it serves; settings come from
# OCTAVO_* variables, a file named by OCTAVO_CONFIG, and the arguments. `health` is the health check;
# the other commands of octavo are passed through.
set -euo pipefail

export OCTAVO_HOST="${OCTAVO_HOST:-0.0.0.0}"

case "${1:-}" in
    health)
        exec python -c 'import os, urllib.request
port = os.environ.get("OCTAVO_PORT") or "8000"
urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)' ;;
    serve|chat|complete|bench|models|version) exec octavo "$@" ;;
    *) exec octavo serve "$@" ;;
esac
