"""The stored tensors that belong to one quantised module, checked before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from engine.weights.safetensors import StoredTensor

FLOATING = ("F32", "BF16", "F16")


def modules_with(stored: Mapping[str, StoredTensor], suffix: str) -> Iterator[str]:
    """Names of the modules that have a tensor `suffix`."""
    return (name.removesuffix(suffix) for name in stored if name.endswith(suffix))


def part(stored: Mapping[str, StoredTensor], name: str, *dtypes: str) -> StoredTensor:
    """The tensor `name`. Raises CheckpointError when it is missing or has none of the types."""
    found = next(iter(stored.values()), None)
    where = found.file.parent if found else ""
    if name not in stored:
        raise CheckpointError(f"{where}: tensor '{name}' is missing")
    tensor = stored[name]
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.file}: tensor '{name}' has the type {tensor.dtype}, needed is {' or '.join(dtypes)}"
        )
    return tensor


def need(correct: bool, tensor: StoredTensor, wanted: str) -> None:
    """Raises CheckpointError: what shape the tensor has, and what is wanted instead."""
    if not correct:
        raise CheckpointError(
            f"{tensor.file}: tensor '{tensor.name}' has shape {list(tensor.shape)}, needed is {wanted}"
        )


def group_of(indices: torch.Tensor, num_groups: int) -> torch.Tensor | None:
    """The group of each input, as an index; None where the file says -1: groups in order.

    Raises CheckpointError for a group that there is not.
    """
    low, high = int(indices.min()), int(indices.max())
    if low == -1:
        return None
    if low < 0 or high >= num_groups:
        raise CheckpointError(f"a g_idx names group {high if low >= 0 else low} of {num_groups}")
    return indices.long()
