"""The tokeniser of the default model, built once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine.checkpoint import locate
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(locate(str(smollm2_gguf)))
