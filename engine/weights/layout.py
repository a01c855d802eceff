"""The tensors that a transformer computes with, and which stored tensors each of them is made of.

A model's tensors are laid out as the kernels read them: query, key and value rows in one matrix, all
experts of a layer in one. The loader allocates each of them once and lets every stored tensor fill its
part: `target[piece.place] = arrange(stored)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

Shape = tuple[int, ...]
Place = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tensor and the place that it fills: `place` indexes the target; () is all of it.

    `stored` is its name in the checkpoint, `shape` the one it must have there. `arrange` brings what was
    read (widened, in that shape) into the target's order; None: it is in that order. `module` is the
    Hugging Face module that the tensor is the weight of, by which adapters name it; "" where no adapter can.
    What an adapter adds is [out, in] in Hugging Face's order, which a file need not share:
    `arrange_adapter` brings that into the target's order.
    """

    stored: str
    shape: Shape
    place: Place = ()
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None
    module: str = ""
    arrange_adapter: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the model. `pieces` fill it without a gap."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    exact: bool = False  # kept in float32, whatever the model's dtype
