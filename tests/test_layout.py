"""The direction of imports: server -> engine -> scheduler, engine -> cuda_kernels; nothing runs back up."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "scheduler": set(),
    "cuda_kernels": set(),
    "engine": {"scheduler", "cuda_kernels"},
    "server": {"engine", "scheduler"},
}
# What of the engine the server may touch: its client, configuration, messages and checkpoints.
SERVER_SEES = {
    "engine.checkpoint",
    "engine.client",
    "engine.config",
    "engine.description",  # of `octavo models`
    "engine.messages",
    "engine.models.config",
    "engine.vocabulary",
    "engine.vocabulary.document",
    "engine.vocabulary.token_bytes",
    "engine.weights",  # .embedded: where the default model lies
    "engine.weights.gguf",
    "engine.weights.json_files",
    "engine.weights.paths",
    "scheduler.config",
    "scheduler.costs",
    "scheduler.machine",
    "scheduler.plan",
    "scheduler.refusal",
    "scheduler.replay.load",
    "scheduler.replay.report",
    "scheduler.replay.run",
    "scheduler.replay.trace",
    "scheduler.snapshot",
    "scheduler.types",
}


def imports_of(package: str) -> set[tuple[str, str]]:
    """(file, imported module) for each import of one of our packages."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] in ALLOWED and name.split(".")[0] != package:
                    found.add((str(path.relative_to(ROOT)), name))
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_no_package_imports_against_the_direction(package):
    wrong = {entry for entry in imports_of(package) if entry[1].split(".")[0] not in ALLOWED[package]}
    assert not wrong


def test_the_server_touches_only_the_engines_edge():
    assert {entry for entry in imports_of("server") if entry[1] not in SERVER_SEES} == set()


@pytest.mark.parametrize(
    ("module", "absent"),
    [("server.serve", "torch"), ("server.bench.run", "torch"), ("scheduler.scheduler", "numpy")],
)
def test_what_must_start_fast_imports_nothing_heavy(module, absent):
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_unpickles():
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "import pickle" not in text, path
            assert "torch.load(" not in text, path
            assert "recv_pyobj" not in text, path
