"""Which layer sees how much, and which turns, as config.json says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.models.config import Layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.models.config import Rope
    from engine.models.fields import Fields

MAX_CONTEXT = 131072  # what several families' configuration classes assume
_KNOWN = ("full_attention", "sliding_attention")


def kinds(fields: Fields, default: Sequence[str], known: tuple[str, ...] = _KNOWN) -> tuple[str, ...]:
    """`layer_types`: one for each layer."""
    written = fields.items("layer_types", len(default), (str,))
    for kind in written or ():
        if kind not in known:
            raise fields.unsupported("layer_types", kind)
    return tuple(default if written is None else written)


def alternating(count: int, period: int) -> list[str]:
    """Every `period`-th layer sees everything."""
    return ["full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(count)]


def read_layers(rope: Rope, found: tuple[str, ...], window: int) -> tuple[Layer, ...]:
    everywhere, local = Layer(rope=rope), Layer(rope=rope, window=window)
    return tuple(local if kind == "sliding_attention" else everywhere for kind in found)


def window_of(fields: Fields) -> int:
    """`sliding_window`, 0 where it is null."""
    return fields.count("sliding_window") if fields.has("sliding_window") else 0


def windowed(fields: Fields) -> int:
    """`sliding_window` where `use_sliding_window` switches it on."""
    return window_of(fields) if fields.flag("use_sliding_window") else 0


def rotates(fields: Fields, count: int) -> tuple[bool, ...]:
    """`no_rope_layers` has 1 for the layers that do rotate."""
    written = (
        fields.items("no_rope_layers", count, (int, bool)) if fields.values.get("no_rope_layers") else None
    )
    if written is not None:
        return tuple(map(bool, written))
    interval = fields.count("no_rope_layer_interval", 4)
    return tuple((index + 1) % interval != 0 for index in range(count))
