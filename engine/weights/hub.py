"""Checkpoints by their name on the Hugging Face hub. The library is imported only when one is asked for."""

from __future__ import annotations

import re
from pathlib import Path

from engine.weights.errors import CheckpointError

# What is read, and nothing else: no pickled weights, no code, no other formats' copies of the weights.
# Adapters are named by their folder, GGUF files by their path.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "model.safetensors.index.json",
    "model*.safetensors",
    "gptq_model*.safetensors",
    "medusa_lm_head.safetensors",
)
# The library's patterns reach into folders, where other copies of the weights may lie.
IGNORED = ("*/*.safetensors",)

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_hub_name(model: str) -> bool:
    return _NAME.fullmatch(model) is not None


def fetch(name: str, revision: str = "") -> Path:
    """Download what is missing (with a progress bar on stderr) -> the folder in the local cache.

    Without a network a snapshot that is already there is used. Raises CheckpointError.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = f"'{name}'" + (f" at revision '{revision}'" if revision else "")
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=list(FILES), ignore_patterns=list(IGNORED)
        )
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        raise CheckpointError(
            f"cannot reach {constants.ENDPOINT} for {wanted} ({_first_line(cause)}), "
            f"and the cache {constants.HF_HUB_CACHE} does not have it"
        ) from error
    except Exception as error:  # a network has many ways to fail, and so has the library
        raise CheckpointError(
            f"cannot fetch {wanted} from {constants.ENDPOINT}: {_first_line(error)}"
        ) from error
    return _checked(Path(folder), wanted)


def _checked(folder: Path, wanted: str) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{wanted} has no config.json: it is no folder of a model; a .gguf file is served by its own path"
        )
    return folder


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
