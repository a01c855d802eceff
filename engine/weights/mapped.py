"""Files of weights as memory: pages come as they are read, and are given back after that."""

from __future__ import annotations

import mmap
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from engine.weights.safetensors import StoredTensor

warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # nobody writes to it

DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class MappedFiles:
    """Maps the files of some tensors, until they are closed."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._states: dict[Path, tuple[int, int]] = {}

    def open(self, tensors: Iterable[StoredTensor]) -> None:
        """Raises CheckpointError. Threads may read what was opened before they began."""
        try:
            for stored in tensors:
                if stored.file not in self._maps:
                    self._map(stored.file)
                self._check(stored)
        except CheckpointError:
            self.close()
            raise

    def _map(self, path: Path) -> None:
        try:
            self._states[path] = _state(path)
            with path.open("rb") as file:
                # What could be written counts as memory at once: a file larger than it could not be mapped.
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _check(self, stored: StoredTensor) -> None:
        """The file may have changed since its header was read; beyond its end the process would be killed."""
        if stored.offset + stored.num_bytes > len(self._maps[stored.file]):
            raise CheckpointError(
                f"{stored.file}: tensor '{stored.name}' ends at byte {stored.offset + stored.num_bytes}, but "
                f"the file has {len(self._maps[stored.file])} bytes now"
            )

    def view(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor in the file's own memory: not to be written, and gone when the file is closed."""
        data, dtype = self._maps[stored.file], DTYPES[stored.dtype]
        if not stored.num_bytes:
            return torch.empty(stored.shape, dtype=dtype)
        self._advise(data, "MADV_WILLNEED", stored)
        raw = torch.frombuffer(data, dtype=torch.uint8, count=stored.num_bytes, offset=stored.offset)
        if stored.offset % dtype.itemsize:  # headers of any length are allowed
            raw = raw.clone()
        return raw.view(dtype).view(stored.shape)

    def drop(self, stored: StoredTensor) -> None:
        """Its pages are not needed again: they stop counting as memory of this process."""
        self._advise(self._maps[stored.file], "MADV_DONTNEED", stored)

    def check_unchanged(self) -> None:
        """Raises CheckpointError: what was read may be half of one model and half of another."""
        for path, state in self._states.items():
            with suppress(OSError):
                if _state(path) == state:
                    continue
            raise CheckpointError(f"{path}: was changed or removed while it was loaded: start again")

    def finish(self, *, failed: bool) -> None:
        """Close all. Raises CheckpointError where nothing has `failed`, but a file has changed meanwhile."""
        try:
            if not failed:
                self.check_unchanged()
        finally:
            self.close()

    def close(self) -> None:
        for data in self._maps.values():
            with suppress(BufferError):  # after a failure a tensor may still look at it and keeps it
                data.close()
        self._maps.clear()
        self._states.clear()

    @staticmethod
    def _advise(data: mmap.mmap, name: str, stored: StoredTensor) -> None:
        advice: Any = getattr(mmap, name, None)
        if advice is None or not stored.num_bytes:
            return
        start = stored.offset // mmap.PAGESIZE * mmap.PAGESIZE
        data.madvise(advice, start, stored.offset + stored.num_bytes - start)


def _state(path: Path) -> tuple[int, int]:
    """What another content has another one of: size and time of change. Raises OSError."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
