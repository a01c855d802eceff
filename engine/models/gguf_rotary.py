"""Rotary positions as GGUF metadata and tensors describe them. No torch here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.models.config import Rope, RopeScaling, ScalingKind
from engine.models.fields import decimal, unsupported
from engine.models.rotary_fields import longrope_attention, yarn_attention

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.models.fields import Fields

    Factors = Mapping[str, tuple[float, ...]]

ROPE_KEYS = frozenset(
    {
        "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier",
    }
)  # fmt: skip
_ALL, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
FACTOR_TENSORS = (_ALL, _SHORT, _LONG)


def read_rope(
    fields: Fields, head_dim: int, factors: Factors, *, partial: bool = False, truncate: bool = True
) -> Rope:
    """`partial`: a part of a head may turn. `truncate`: of YaRN, which files do not say. Raises
    CheckpointError."""
    num_rotated = fields.count("rope.dimension_count", head_dim)
    if num_rotated != head_dim and not (partial and num_rotated < head_dim and num_rotated % 2 == 0):
        raise fields.unsupported("rope.dimension_count", num_rotated, f" with heads of {head_dim}")
    for name, values in factors.items():
        if len(values) != num_rotated // 2 or not all(0 < value < math.inf for value in values):
            raise unsupported(f"tensor {name}", values, f"; {num_rotated // 2} numbers are needed")
    theta = decimal(fields.number("rope.freq_base", 10000.0))
    return Rope(theta=theta, num_rotated=num_rotated, scaling=_scaling(fields, factors, truncate))


def _scaling(fields: Fields, factors: Factors, truncate: bool) -> RopeScaling | None:
    if _LONG in factors and _SHORT in factors:
        return _longrope(fields, factors)
    if _ALL in factors:
        fields.check("rope.scaling.type", "none")
        return RopeScaling(kind=ScalingKind.FACTORS, factors=factors[_ALL])
    kind = fields.values.get("rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling(kind=ScalingKind.LINEAR, factor=decimal(fields.number("rope.scaling.factor")))
    if kind == "yarn":
        return _yarn(fields, truncate)
    if kind != "none":
        raise fields.unsupported("rope.scaling.type", kind)
    return None


def _yarn(fields: Fields, truncate: bool) -> RopeScaling:
    factor = decimal(fields.number("rope.scaling.factor"))
    fields.check("rope.scaling.yarn_ext_factor", 1.0)
    attention = yarn_attention(factor)
    if fields.values.get("rope.scaling.yarn_log_multiplier"):
        attention /= yarn_attention(factor, decimal(fields.number("rope.scaling.yarn_log_multiplier")))
    attention = decimal(fields.number("rope.scaling.yarn_attn_factor", attention))
    return RopeScaling(
        kind=ScalingKind.YARN,
        factor=factor,
        original_max_positions=_original(fields),
        beta_fast=decimal(fields.number("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=decimal(fields.number("rope.scaling.yarn_beta_slow", 1.0)),
        truncate=truncate,
        attention_factor=attention * decimal(fields.number("rope.scaling.attn_factor", 1.0)),
    )


def _longrope(fields: Fields, factors: Factors) -> RopeScaling:
    """A written attention factor that is the rule's, but for its 32 bits, is the rule's."""
    original = _original(fields)
    factor = fields.count("context_length") / original
    rule = longrope_attention(factor, original)
    attention = fields.number("rope.scaling.attn_factor", rule)
    return RopeScaling(
        kind=ScalingKind.LONGROPE,
        factor=factor,
        original_max_positions=original,
        attention_factor=rule if math.isclose(attention, rule, rel_tol=1e-6) else attention,
        factors=factors[_SHORT],
        long_factors=factors[_LONG],
    )


def _original(fields: Fields) -> int:
    return fields.count("rope.scaling.original_context_length", fields.count("context_length"))
