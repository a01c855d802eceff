"""What the families read of a GGUF file: metadata under their architecture, names and values of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.models.gguf_rotary import read_rope

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from engine.models.config import Rope
    from engine.models.fields import Fields


@dataclass(frozen=True, slots=True)
class Header:
    """What a family reads: the fields under its architecture, the tensors' names, the rotary factors."""

    fields: Fields
    tensors: Collection[str]
    factors: Mapping[str, tuple[float, ...]]
    head_dim: int
    num_layers: int

    def rope(self, *, partial: bool = False, truncate: bool = True) -> Rope:
        return read_rope(self.fields, self.head_dim, self.factors, partial=partial, truncate=truncate)

    def window(self, default: int = 0) -> int:
        return self.fields.count("attention.sliding_window", default, least=0)

    def local(self, period: int) -> tuple[bool, ...]:
        """Which layers have the window: the file says it by a list or a period, or the family does."""
        name, count = "attention.sliding_window_pattern", self.num_layers
        if isinstance(self.fields.values.get(name), tuple):
            return tuple(map(bool, self.fields.items(name, count, (bool, int)) or ()))
        period = self.fields.count(name, period)
        return tuple((index + 1) % period != 0 for index in range(count))

    def intermediate_size(self) -> int:
        """Of the layers without experts, which files of experts alone may leave out."""
        return self.fields.count("feed_forward_length", self.fields.values.get("expert_feed_forward_length"))

    @property
    def has_experts(self) -> bool:
        return bool(self.fields.values.get("expert_count"))

    @property
    def llama4_without_chunks(self) -> bool:
        """A window of 0 stands for no chunks, and positions in every layer."""
        return self.fields.values.get("attention.sliding_window") == 0
