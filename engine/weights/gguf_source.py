"""The tensors of a GGUF file, widened block by block."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from engine.weights.dequantise import SUPPORTED, can_dequantise, dequantise
from engine.weights.errors import CheckpointError
from engine.weights.safetensors import StoredTensor
from engine.weights.source import Recipe, WeightSource

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from engine.weights.gguf import BlockType, GGUFFile, TensorInfo


def gguf_source(file: GGUFFile) -> WeightSource:
    bytes_of: Counter[str] = Counter()
    for info in file.tensors.values():
        bytes_of[info.type.name] += info.num_bytes
    most = bytes_of.most_common(1)
    name = f"GGUF {most[0][0]}" if most else "GGUF"
    return WeightSource(name, {key: partial(_recipe, file.path, info) for key, info in file.tensors.items()})


def _recipe(path: Path, info: TensorInfo) -> Recipe:
    if not can_dequantise(info.type):
        raise CheckpointError(
            f"{path}: tensor '{info.name}' has the type {info.type.name}; supported are "
            f"{', '.join(SUPPORTED)}"
        )
    stored = StoredTensor(path, info.name, "U8", (info.num_bytes,), info.offset, info.num_bytes)
    return Recipe(info.shape, (stored,), partial(_widen, info.type))


def _widen(kind: BlockType, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    dequantise(parts[0], kind, out.view(-1))
