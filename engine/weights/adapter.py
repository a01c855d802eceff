"""A LoRA adapter, as PEFT saves it, merged into the weights as they are loaded.

LoRA (Hu 2021): W + s B A. DoRA (Liu 2024): rows of that, scaled to the lengths that the adapter says. Whole
modules that were trained along (`modules_to_save`) replace the base's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch

from engine.weights.adapter_settings import AdapterSettings, read_settings
from engine.weights.errors import CheckpointError
from engine.weights.mapped import MappedFiles
from engine.weights.safetensors import StoredTensor, read_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from engine.weights.layout import Piece, Target
    from engine.weights.safetensors import Shape

    Read = Callable[[StoredTensor], torch.Tensor]

WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_ROOTS = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_FLOATING = ("F32", "BF16", "F16")
# The two matrices are called otherwise where the module is an embedding, and stored the other way round.
_DOWN, _UP = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")
_MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_BASE = "base_layer.weight"


class Change(Protocol):
    """What an adapter makes of the weights of one module."""

    @property
    def parts(self) -> tuple[StoredTensor, ...]: ...

    def fits(self, shape: Shape) -> bool:
        """Whether it is one for a weight of this shape."""

    def apply(self, weights: torch.Tensor, read: Read) -> None:
        """Change `weights`, of float32, in place; `read` gives a part as float32 on the same device."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """down [r, in], up [out, r]; of an embedding, whose rows are inputs, the product is transposed."""

    down: StoredTensor
    up: StoredTensor
    scale: float
    embedding: bool
    base: StoredTensor | None  # replaces the base's weights before all else
    magnitude: StoredTensor | None  # [out]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return tuple(part for part in (self.down, self.up, self.base, self.magnitude) if part)

    def fits(self, shape: Shape) -> bool:
        product = (self.up.shape[0], self.down.shape[1])
        based = self.base is None or self.base.shape == shape
        scaled = self.magnitude is None or self.magnitude.shape == product[:1]
        return based and scaled and shape == (product[::-1] if self.embedding else product)

    def apply(self, weights: torch.Tensor, read: Read) -> None:
        if self.base is not None:
            weights.copy_(read(self.base))
        product = read(self.up) @ read(self.down)
        weights.add_(product.T if self.embedding else product, alpha=self.scale)
        if self.magnitude is not None:
            lengths = torch.linalg.vector_norm(weights, dim=1)
            weights.mul_((read(self.magnitude) / lengths)[:, None])


@dataclass(frozen=True, slots=True)
class Replacement:
    whole: StoredTensor

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return (self.whole,)

    def fits(self, shape: Shape) -> bool:
        return self.whole.shape == shape

    def apply(self, weights: torch.Tensor, read: Read) -> None:
        weights.copy_(read(self.whole))


class Adapter:
    """A context manager: inside of it `merge` may be called by several threads."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers. Raises CheckpointError."""
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no folder of a LoRA adapter")
        settings = read_settings(folder)
        if not (folder / WEIGHTS).is_file():
            pickled = " (adapter_model.bin is pickled, which could run code, and is never opened)"
            more = pickled if (folder / "adapter_model.bin").is_file() else ""
            raise CheckpointError(f"{folder}: {WEIGHTS} is missing{more}")
        self._changes = _changes(read_safetensors(folder / WEIGHTS), settings)
        if not self._changes:
            raise CheckpointError(f"{folder / WEIGHTS}: changes nothing: it has no tensors")
        self._files = MappedFiles()

    @property
    def num_modules(self) -> int:
        return len(self._changes)

    def check(self, targets: Iterable[Target]) -> None:
        """Everything that the adapter changes is there and has the right shape, else CheckpointError."""
        pieces = {_canonical(p.module): p for target in targets for p in target.pieces if _can_be_adapted(p)}
        tied = not any(target.name == "head" for target in targets)
        for module, change in self._changes.items():
            first = change.parts[0]
            where = f"{first.file}: tensor '{first.name}'"
            if module not in pieces:
                raise CheckpointError(f"{where} belongs to no weight of the model that can be adapted")
            if tied and module == "embed_tokens":
                raise CheckpointError(f"{where} changes the embedding, which this model shares with its head")
            if not change.fits(pieces[module].shape):
                shapes = " and ".join(str(list(part.shape)) for part in change.parts)
                raise CheckpointError(
                    f"{where}: {shapes} do not fit a weight of {list(pieces[module].shape)}"
                )

    def changes(self, piece: Piece) -> bool:
        return _can_be_adapted(piece) and _canonical(piece.module) in self._changes

    def merge(self, piece: Piece, weights: torch.Tensor) -> None:
        """Change `weights`, of float32, which are those of the piece's module in its order, in place."""
        change = self._changes[_canonical(piece.module)]
        change.apply(weights, lambda part: self._files.view(part).to(weights.device, torch.float32))
        for part in change.parts:
            self._files.drop(part)

    def __enter__(self) -> Self:
        self._files.open(part for change in self._changes.values() for part in change.parts)
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self._files.finish(failed=failure is not None)


def _can_be_adapted(piece: Piece) -> bool:
    return bool(piece.module) and len(piece.shape) == 2


def _canonical(module: str) -> str:
    """A module's name from the decoder on: models that also see keep it in one place or another."""
    return next((module.removeprefix(root) for root in _ROOTS if module.startswith(root)), module)


def _changes(stored: Mapping[str, StoredTensor], settings: AdapterSettings) -> dict[str, Change]:
    """Module -> change. Raises CheckpointError, which names the first tensor that has no meaning."""
    changes: dict[str, Change] = {}
    rest = dict(stored)
    for name in stored:
        module, ending = _split(name)
        if ending not in _DOWN:
            continue
        if _canonical(module) in changes:
            raise CheckpointError(f"{stored[name].file}: tensor '{name}' is the second one for its module")
        changes[_canonical(module)] = _low_rank(rest, name, module, ending, settings)
    for name, tensor in rest.items():
        module, ending = _split(name.replace(".modules_to_save", ""))
        if ending != "weight" or _canonical(module) in changes:
            raise CheckpointError(f"{tensor.file}: tensor '{name}' is none of a supported LoRA adapter")
        changes[_canonical(module)] = Replacement(_floating(tensor))
    return changes


def _split(name: str) -> tuple[str, str]:
    """-> the module's name as the base model has it, and what of it the tensor is"""
    inner = name.removeprefix(_PREFIX)
    for ending in (*_DOWN, *_UP, *_MAGNITUDE, _BASE, "weight"):
        if inner.endswith(f".{ending}"):
            return inner.removesuffix(f".{ending}"), ending
    return inner, ""


def _low_rank(
    rest: dict[str, StoredTensor], name: str, module: str, ending: str, settings: AdapterSettings
) -> LowRank:
    """The change whose down matrix is `name`, taken out of `rest`."""
    stem, embedding = name.removesuffix(ending), ending == _DOWN[1]
    down, up = rest.pop(name), rest.pop(stem + _UP[_DOWN.index(ending)], None)
    if up is None:
        raise CheckpointError(f"{down.file}: tensor '{name}' comes without its other half")
    magnitudes = [rest.pop(stem + known) for known in _MAGNITUDE if stem + known in rest]
    if len(magnitudes) != settings.magnitudes or (embedding and magnitudes):
        raise CheckpointError(
            f"{down.file}: tensor '{name}' has {len(magnitudes)} magnitude vectors; DoRA is "
            f"{'on' if settings.magnitudes else 'off'}, and not supported for embeddings"
        )
    rank = down.shape[0] if down.shape else 0
    matrices = len(down.shape) == len(up.shape) == 2
    if not matrices or up.shape[1] != rank or rank not in settings.ranks or not down.num_bytes:
        raise CheckpointError(
            f"{down.file}: '{down.name}' {list(down.shape)} and '{up.name}' {list(up.shape)} are no matrices "
            f"of rank {' or '.join(map(str, sorted(settings.ranks)))}"
        )
    change = LowRank(
        down=down,
        up=up,
        scale=settings.scale(module, rank),
        embedding=embedding,
        base=rest.pop(stem + _BASE, None),
        magnitude=magnitudes[0] if magnitudes else None,
    )
    for tensor in change.parts:
        _floating(tensor)
    return change


def _floating(tensor: StoredTensor) -> StoredTensor:
    if tensor.dtype not in _FLOATING:
        raise CheckpointError(f"{tensor.file}: tensor '{tensor.name}' has the type {tensor.dtype}")
    return tensor
