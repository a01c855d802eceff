"""What is wrong with a checkpoint, in one line that names the thing."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be found, read or supported. The text is one line, fit for a terminal."""

    def __init__(self, text: str) -> None:
        # Names and values in it are the checkpoint's own: line breaks and a terminal's commands included.
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))
