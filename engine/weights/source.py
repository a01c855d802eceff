"""A checkpoint's weights as plain tensors, whatever they are stored as."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from engine.weights.errors import CheckpointError
from engine.weights.mapped import MappedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from engine.weights.safetensors import Shape, StoredTensor

    Widen = Callable[[Sequence[torch.Tensor], torch.Tensor], None]


_COMPARED_BYTES = 2**24  # at a time: where two tensors differ, they do so soon


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one plain tensor is made of stored ones.

    `widen` takes `parts` as they are stored, on any device, and fills a contiguous tensor of `shape`, of any
    floating type, on that device. It computes in float32 and rounds once. A `transposed` one fills a tensor
    faster whose last two dimensions are the other way round in memory.
    """

    shape: Shape
    parts: tuple[StoredTensor, ...]
    widen: Widen
    transposed: bool = False


class WeightSource:
    """Plain tensors by name. Recipes are made when asked for: what is not needed may be unreadable.

    A context manager: inside of it the files are open, and `read_into` may be called by several threads.
    """

    def __init__(
        self,
        format_name: str,
        recipes: Mapping[str, Callable[[], Recipe]],
        quantised_activations: bool = False,
        quantised: bool = False,
    ) -> None:
        self.format_name = format_name  # for people: "GGUF Q4_1", "safetensors BF16"
        self.quantised = quantised  # beside the parts of recipes there may be tensors that no recipe needs
        self.quantised_activations = quantised_activations  # as its makers meant it; not computed so here
        self._makers = recipes
        self._recipes: dict[str, Recipe] = {}
        self._files = MappedFiles()

    @property
    def names(self) -> Collection[str]:
        return self._makers.keys()

    def recipe(self, name: str) -> Recipe:
        """Raises CheckpointError where the stored tensors do not fit each other or are not supported."""
        if name not in self._recipes:
            self._recipes[name] = self._makers[name]()
        return self._recipes[name]

    def shape(self, name: str) -> Shape:
        return self.recipe(name).shape

    def stored_bytes(self, name: str) -> int:
        return sum(part.num_bytes for part in self.recipe(name).parts)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are stored alike, to the last bit. Only files that are closed can be asked."""
        one, other = self.recipe(first), self.recipe(second)
        if one.shape != other.shape or len(one.parts) != 1 or len(other.parts) != 1:
            return False
        (mine,), (theirs,) = one.parts, other.parts
        if (mine.dtype, mine.num_bytes, one.widen) != (theirs.dtype, theirs.num_bytes, other.widen):
            return False
        with self._opened(first, second):
            one_raw, other_raw = (
                self._files.view(part).view(-1).view(torch.uint8) for part in (mine, theirs)
            )
            return all(
                torch.equal(
                    one_raw[start : start + _COMPARED_BYTES], other_raw[start : start + _COMPARED_BYTES]
                )
                for start in range(0, mine.num_bytes, _COMPARED_BYTES)
            )

    def is_zero(self, name: str) -> bool:
        """Whether it holds zeros only. Only files that are closed can be asked."""
        out = torch.empty(self.shape(name), dtype=torch.float32)
        with self._opened(name):
            self.read_into(name, out)
        return not out.any()

    @contextmanager
    def _opened(self, *names: str) -> Iterator[None]:
        """Their files alone: thousands of biases may be looked at, each with the whole model's files open."""
        self._files.open(part for name in names for part in self.recipe(name).parts)
        try:
            yield
        except BaseException:
            self._files.finish(failed=True)
            raise
        self._files.finish(failed=False)

    def empty(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What `read_into` fills fastest: of the tensor's shape, not always contiguous."""
        shape = self._recipes[name].shape
        if not self._recipes[name].transposed:
            return torch.empty(shape, dtype=dtype, device=device)
        stored = (*shape[:-2], shape[-1], shape[-2])
        return torch.empty(stored, dtype=dtype, device=device).transpose(-1, -2)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`: contiguous or from `empty`, of any floating type, on any device.

        Raises CheckpointError where the numbers contradict each other, as a group that does not exist.
        """
        recipe = self._recipes[name]
        try:
            recipe.widen([self._files.view(part).to(out.device) for part in recipe.parts], out)
        except CheckpointError as error:
            raise CheckpointError(f"{recipe.parts[0].file}: tensor '{name}': {error}") from error
        for part in recipe.parts:
            self._files.drop(part)

    def __enter__(self) -> Self:
        """Opens the files of the recipes that were asked for. Raises CheckpointError."""
        self._files.open(part for recipe in self._recipes.values() for part in recipe.parts)
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self._files.finish(failed=failure is not None)
