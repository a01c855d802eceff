"""Rotary positions as GGUF metadata describes them. No torch here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.models.config import Rope, RopeScaling, ScalingKind
from engine.models.fields import decimal, unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.models.fields import Fields

ROPE_KEYS = frozenset(
    {
        "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned",
    }
)  # fmt: skip
FACTOR_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def read_rope(
    fields: Fields, head_dim: int, factors: Mapping[str, tuple[float, ...]], *, partial: bool = False
) -> Rope:
    """`partial`: a part of a head may turn. Raises CheckpointError."""
    num_rotated = fields.count("rope.dimension_count", head_dim)
    if num_rotated != head_dim and not (partial and num_rotated < head_dim and num_rotated % 2 == 0):
        raise fields.unsupported("rope.dimension_count", num_rotated, f" with heads of {head_dim}")
    theta = decimal(fields.number("rope.freq_base", 10000.0))
    for name, values in factors.items():
        if len(values) != num_rotated // 2 or not all(0 < value < math.inf for value in values):
            raise unsupported(f"tensor {name}", values, f"; {num_rotated // 2} numbers are needed")
    return Rope(theta=theta, num_rotated=num_rotated, scaling=_scaling(fields, factors))


def _scaling(fields: Fields, factors: Mapping[str, tuple[float, ...]]) -> RopeScaling | None:
    kind = fields.values.get("rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling(kind=ScalingKind.LINEAR, factor=decimal(fields.number("rope.scaling.factor")))
    if kind != "none":
        raise fields.unsupported("rope.scaling.type", kind)
    if "rope_freqs.weight" in factors:
        return RopeScaling(kind=ScalingKind.FACTORS, factors=factors["rope_freqs.weight"])
    return None
