"""Whether a file is the one that was promised, found out while it is loaded; and which weights those are."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from engine.weights.errors import CheckpointError
from engine.weights.filling import workers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from concurrent.futures import Future
    from pathlib import Path

    from engine.checkpoint import Checkpoint

_CHUNK_BYTES = 2**22
_ROW_WORDS, _WORD_BYTES = 512, 8  # tensors are summed up as rows of 4 KiB


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


def weights_digest(weights: Mapping[str, torch.Tensor], num_threads: int = 0) -> bytes:
    """Of every number that a model computes with, as loaded: an adapter is in it, a file's name or time is
    not. Names, types and shapes count, then each tensor by `_sums`. It tells models apart that differ
    anywhere by training, not those that somebody made to collide. `num_threads`: 0 = as many as torch has."""
    digest = hashlib.blake2b(digest_size=32)
    with workers(num_threads or torch.get_num_threads()) as pool:
        names = sorted(weights)
        for name, sums in zip(names, pool.map(_sums, [weights[name] for name in names]), strict=True):
            digest.update(repr((name, weights[name].dtype, tuple(weights[name].shape))).encode())
            digest.update(sums)
    return digest.digest()


def _sums(tensor: torch.Tensor) -> bytes:
    """Of its rows and of its columns, read as words. Integers wrap, so sums are exact in any order and on any
    device; they are had as fast as memory is read."""
    octets = tensor.contiguous().view(-1).view(torch.uint8)
    num_rows, rest = divmod(octets.numel(), _ROW_WORDS * _WORD_BYTES)
    whole = octets.numel() - rest
    rows = octets[:whole].view(torch.int64).view(num_rows, _ROW_WORDS)
    return b"".join(part.cpu().numpy().tobytes() for part in (rows.sum(1), rows.sum(0), octets[whole:]))
