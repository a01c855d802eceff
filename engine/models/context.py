"""A model's shape for the context that is served: what its length decides, decided once. No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from engine.models.config import ScalingKind

if TYPE_CHECKING:
    from engine.models.config import Layer, Rope, TransformerConfig


def for_context(config: TransformerConfig, max_model_len: int) -> TransformerConfig:
    """The shape for sequences of at most `max_model_len` tokens.

    Longrope has factors for short and for long texts. Keys in the cache cannot change theirs when a text
    grows, so all texts get the long ones where the served context is longer than the original one. Windows
    and chunks that no sequence outgrows are none.
    """
    layers: dict[Layer, Layer] = {}
    for layer in config.layers:
        if layer not in layers:
            window = layer.window if layer.window < max_model_len else 0
            chunk = layer.chunk if layer.chunk < max_model_len else 0
            rope = layer.rope and _for_context(layer.rope, max_model_len)
            layers[layer] = replace(layer, window=window, chunk=chunk, rope=rope)
    return replace(config, layers=tuple(layers[layer] for layer in config.layers))


def _for_context(rope: Rope, max_model_len: int) -> Rope:
    scaling = rope.scaling
    if scaling is None or scaling.kind is not ScalingKind.LONGROPE:
        return rope
    long = max_model_len > scaling.original_max_positions
    factors = scaling.long_factors if long else scaling.factors
    return replace(rope, scaling=replace(scaling, kind=ScalingKind.FACTORS, factors=factors, long_factors=()))
