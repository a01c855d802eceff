"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from engine.weights.errors import CheckpointError

_SHOWN_CHARS = 200


def is_gguf(path: Path) -> bool:
    """By its name, in small letters or capitals."""
    return path.suffix.lower() == ".gguf"


def named_path(name: str, what: str = "") -> Path:
    """The path, `~` and `~user` being home folders; it need not exist. `what` it is, for errors.

    Raises CheckpointError for what can be no path: an unknown user's home, a name that is too long.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{what} '{name[:_SHOWN_CHARS]}': {cause}".strip()) from None
    return path
