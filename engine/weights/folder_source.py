"""The tensors of a folder of safetensors files, plain or quantised."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from engine.weights.errors import CheckpointError
from engine.weights.safetensors import StoredTensor, read_folder
from engine.weights.source import Recipe, WeightSource

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

_PLAIN = ("F32", "BF16", "F16", "F64")


def folder_source(folder: Path) -> WeightSource:
    """Raises CheckpointError for files that are not sound and for quantisations that are not supported."""
    stored = read_folder(folder)
    bytes_of: Counter[str] = Counter()
    for tensor in stored.values():
        bytes_of[tensor.dtype] += tensor.num_bytes
    most = bytes_of.most_common(1)
    name = f"safetensors {most[0][0]}" if most else "safetensors"
    return WeightSource(name, {key: partial(plain, tensor) for key, tensor in stored.items()})


def plain(stored: StoredTensor) -> Recipe:
    if stored.dtype not in _PLAIN:
        raise CheckpointError(
            f"{stored.file}: tensor '{stored.name}' has the type {stored.dtype}, supported are "
            f"{', '.join(_PLAIN)}"
        )
    return Recipe(stored.shape, (stored,), _copy)


def _copy(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    out.copy_(parts[0])
