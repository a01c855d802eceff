"""The tensors of a folder of safetensors files, plain or quantised."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.weights.errors import CheckpointError
from engine.weights.json_files import read_json_object
from engine.weights.quantised.fields import chunks
from engine.weights.quantised.settings import read_quantisation
from engine.weights.safetensors import StoredTensor, read_folder
from engine.weights.source import Recipe, WeightSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_PLAIN = ("F32", "BF16", "F16", "F64")


def folder_source(folder: Path) -> WeightSource:
    """Raises CheckpointError for files that are not sound and for quantisations that are not supported."""
    config = read_json_object(folder / "config.json")
    try:
        quantisation = read_quantisation(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    stored = read_folder(folder)
    recipes = {name: partial(plain, tensor) for name, tensor in stored.items()}
    if quantisation is None:
        return WeightSource(f"safetensors {_most_stored(stored)}", recipes)
    quantised = quantisation.maker(stored)
    if not quantised:
        raise CheckpointError(f"{folder}: config.json speaks of {quantisation.name}, no tensor is so stored")
    name = f"safetensors, {quantisation.name}"
    return WeightSource(name, recipes | quantised, quantisation.activations, quantised=True)


def plain(stored: StoredTensor) -> Recipe:
    if stored.dtype not in _PLAIN:
        raise CheckpointError(
            f"{stored.file}: tensor '{stored.name}' has the type {stored.dtype}, supported are "
            f"{', '.join(_PLAIN)}"
        )
    return Recipe(stored.shape, (stored,), _copy)


def _copy(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    stored = parts[0]
    halves = stored.dtype is torch.float16 and out.dtype is torch.bfloat16
    if not halves or stored.dim() < 2 or not stored.numel():
        out.copy_(stored)
        return
    # By way of float32 in pieces that the caches hold: torch goes from one half to the other one by one.
    for chunk in chunks(stored.shape[0], stored[0].numel()):
        out[chunk] = stored[chunk].float()


def _most_stored(stored: Mapping[str, StoredTensor]) -> str:
    bytes_of: Counter[str] = Counter()
    for tensor in stored.values():
        bytes_of[tensor.dtype] += tensor.num_bytes
    return bytes_of.most_common(1)[0][0] if bytes_of else "without tensors"
