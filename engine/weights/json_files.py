"""JSON files of a checkpoint, which nobody vouches for: bounded, and wrong ones named in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

MAX_JSON_BYTES = 64 * 2**20


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises CheckpointError, also when the file is absent."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, not a {type(value).__name__}")
    return value


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`. Raises CheckpointError, also when the file is absent."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{path}: neither a file nor a link to one")
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, more than the {MAX_JSON_BYTES} that are read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
