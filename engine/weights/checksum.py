"""Whether a file is the one that was promised, found out while it is loaded."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from engine.checkpoint import Checkpoint

_CHUNK_BYTES = 2**22


@contextmanager
def verified(checkpoint: Checkpoint) -> Iterator[None]:
    """Hash the file in a thread beside the loading, which hardly feels it: hashlib drops the lock."""
    if checkpoint.sha256 is None:
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        found: Future[str] = pool.submit(_sha256, checkpoint.path)
        yield
        if found.result() != checkpoint.sha256:
            raise CheckpointError(f"{checkpoint.path}: SHA-256 is {found.result()}, not {checkpoint.sha256}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    return digest.hexdigest()
