"""What is wrong with a checkpoint, in one line that names the thing."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be found, read or supported. The text is one line, fit for a terminal."""
