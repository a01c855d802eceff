"""The tensors that a transformer computes with, and which stored tensors each of them is made of.

A model's tensors are laid out as the kernels read them: query, key and value rows in one matrix, all
experts of a layer in one. The loader allocates each of them once and lets every stored tensor fill its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tensor and the place that it fills: rows `row ..` of the target, seen as a matrix
    of its last dimension (a vector: seen as a column).

    `stored` is its name in the checkpoint, `shape` the one it must have there. `arrange` brings what was
    read (widened, in that shape) into the target's order. `module` is the Hugging Face module that the
    tensor is the weight of, by which adapters name it; "" where no adapter can. Adapters' rows have the
    module's own order, which must be what `arrange` gives.

    A `stacked` one holds a part of every expert: [E, n, ...], which goes to target[:, row : row + n].
    """

    stored: str
    shape: Shape
    row: int = 0
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None
    module: str = ""
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the model. `pieces` fill it without a gap."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    exact: bool = False  # kept in float32, whatever the model's dtype
