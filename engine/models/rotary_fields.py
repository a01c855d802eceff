"""Rotary positions as config.json describes them, in all its spellings. No torch here.

`rope_theta` beside `rope_scaling`, or both in `rope_parameters`, which may have one object for each type of
layer. The rules by which missing values follow from others are those of Hugging Face's own models.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.models.config import Rope, RopeScaling, ScalingKind

if TYPE_CHECKING:
    from engine.models.fields import Fields

_KINDS = {kind.value: kind for kind in ScalingKind if kind is not ScalingKind.FACTORS} | {
    "su": ScalingKind.LONGROPE
}
# What is read. Anything else in there would turn positions in a way that nobody here knows.
_KNOWN = frozenset(
    {
        "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "finetuned",
        "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "attention_factor",
        "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate", "short_factor", "long_factor",
    }
)  # fmt: skip
_MOST_POSITIONS = 2**31 - 1
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_rope(config: Fields, head_dim: int, *, layer_type: str = "", partial: bool = False) -> Rope:
    """The positions of layers of `layer_type` ("": all layers alike). `partial`: a part of a head may turn.

    Raises CheckpointError.
    """
    fields = _written(config, layer_type)
    for key, value in fields.values.items():
        if key not in _KNOWN and value is not None:
            raise fields.unsupported(key, value)
    share = fields.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    num_rotated = int(head_dim * share)
    if share != 1 and not (partial and 0 < num_rotated <= head_dim and num_rotated % 2 == 0):
        raise config.unsupported("partial_rotary_factor", share, f" with heads of {head_dim}")
    return Rope(
        theta=fields.number("rope_theta", config.number("rope_theta", 10000.0)),
        num_rotated=num_rotated,
        scaling=read_scaling(config, fields, num_rotated),
    )


def read_scaling(config: Fields, fields: Fields, num_rotated: int) -> RopeScaling | None:
    """`fields`: the rotary ones, which may lack what `config` as a whole implies."""
    written = fields.values.get("rope_type", fields.values.get("type", "default"))
    if written == "default":
        return None
    kind = _KINDS.get(written) if isinstance(written, str) else None
    if kind is None:
        raise fields.unsupported("rope_type", written)
    if kind is ScalingKind.YARN and fields.has("short_factor"):
        kind = ScalingKind.LONGROPE  # what the first Phi-3 files called it
    if kind is ScalingKind.LINEAR:
        return RopeScaling(kind=kind, factor=fields.number("factor"))
    max_positions = config.count("max_position_embeddings", 2048)
    if kind is ScalingKind.DYNAMIC:
        return RopeScaling(kind=kind, factor=fields.number("factor"), original_max_positions=max_positions)
    original = config.count(
        "original_max_position_embeddings", fields.count("original_max_position_embeddings", max_positions)
    )
    if kind is ScalingKind.LLAMA3:
        return RopeScaling(
            kind=kind,
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_positions=original,
        )
    factor = fields.number("factor", max_positions / original)
    if kind is ScalingKind.YARN:
        return _yarn(fields, factor, original)
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_max_positions=original,
        attention_factor=fields.number("attention_factor", longrope_attention(factor, original)),
        factors=fields.numbers("short_factor", num_rotated // 2),
        long_factors=fields.numbers("long_factor", num_rotated // 2),
    )


def stretched_positions(max_positions: int, scaling: RopeScaling | None) -> int:
    """How far a model reaches whose `max_position_embeddings` may be from before it was stretched."""
    if scaling is None or scaling.kind not in (ScalingKind.DYNAMIC, ScalingKind.YARN):
        return max_positions
    return max(max_positions, int(min(scaling.original_max_positions * scaling.factor, _MOST_POSITIONS)))


def longrope_attention(factor: float, original: int) -> float:
    """What multiplies cosine and sine (Ding 2024, section 3.3): sqrt(1 + ln(factor) / ln(original))."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def yarn_attention(factor: float, weight: float = 1.0) -> float:
    """What multiplies cosine and sine (Peng 2023, equation 22): 0.1 ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(fields: Fields, factor: float, original: int) -> RopeScaling:
    attention = yarn_attention(factor)
    if fields.values.get("mscale") and fields.values.get("mscale_all_dim"):
        attention = yarn_attention(factor, fields.number("mscale"))
        attention /= yarn_attention(factor, fields.number("mscale_all_dim"))
    return RopeScaling(
        kind=ScalingKind.YARN,
        factor=factor,
        original_max_positions=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        truncate=fields.flag("truncate", True),
        attention_factor=fields.number("attention_factor", attention),
    )


def _written(config: Fields, layer_type: str) -> Fields:
    """The object with the rotary fields. The older spelling wins, as it does there."""
    fields = config.within("rope_scaling" if config.values.get("rope_scaling") else "rope_parameters")
    if not any(kind in fields.values for kind in _LAYER_TYPES):
        return fields
    if not layer_type:
        raise config.unsupported("rope_parameters", dict(fields.values), ": all layers turn alike here")
    return fields.within(layer_type)
