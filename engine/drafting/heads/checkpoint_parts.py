"""Some tensors of a folder, by name: how a drafter's own weights are read. Nothing is unpickled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.weights.errors import CheckpointError
from engine.weights.filling import Filling
from engine.weights.folder_source import folder_source
from engine.weights.layout import Piece, Target

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    import torch

    from engine.weights.layout import Shape


class CheckpointParts:
    """The tensors of a folder with a config.json and *.safetensors, plain or quantised."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers. Raises CheckpointError."""
        self.folder = folder
        self._source = folder_source(folder)

    @property
    def names(self) -> Collection[str]:
        return self._source.names

    def rows(self, name: str) -> int:
        """The first dimension of a tensor. Raises CheckpointError where there is none of that name."""
        shape = self._shape(name)
        return shape[0] if shape else 0

    def whole(self, stored: str, shape: Shape, name: str = "") -> Target:
        """A tensor as it is stored; `name`: what it is called once it is loaded, if not the same."""
        return Target(name or stored, shape, (Piece(stored, shape),))

    def load(
        self, targets: Iterable[Target], dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """By the targets' names. Raises CheckpointError for what is missing or has another shape, before
        anything is read."""
        wanted = list(targets)
        for target in wanted:
            for piece in target.pieces:
                shape = self._shape(piece.stored)
                if shape != piece.shape:
                    raise CheckpointError(
                        f"{self.folder}: tensor '{piece.stored}' has shape {list(shape)}, but "
                        f"{list(piece.shape)} is needed"
                    )
        return Filling(self._source, dtype, device).run(wanted)

    def _shape(self, name: str) -> Shape:
        if name not in self._source.names:
            raise CheckpointError(f"{self.folder}: tensor '{name}' is missing")
        return self._source.shape(name)
