"""Layers whose rows see the same slots, and so share page tables and attention plans. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.models.config import TransformerConfig


@dataclass(frozen=True, slots=True)
class KVGroup:
    """`window` and `chunk` as in `Layer`."""

    window: int
    chunk: int
    layers: tuple[int, ...]


def kv_groups(config: TransformerConfig) -> tuple[KVGroup, ...]:
    """Every layer in exactly one group, groups in the order of their first layers."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, layer in enumerate(config.layers):
        members.setdefault((layer.window, layer.chunk), []).append(index)
    return tuple(KVGroup(window, chunk, tuple(layers)) for (window, chunk), layers in members.items())
