"""The families as their config.json describes them. The definitions are Hugging Face's own models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.models.config import Layer
from engine.models.rotary_fields import read_rope
from engine.models.shape import Family

if TYPE_CHECKING:
    from engine.models.fields import Fields

# Fields that no family supports with another value.
_FIXED: dict[str, tuple[object, ...]] = {"is_encoder_decoder": (False,)}
_SILU: dict[str, tuple[object, ...]] = _FIXED | {"hidden_act": ("silu",)}


def _alike(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    return (Layer(rope=read_rope(fields, head_dim)),) * count


def _biases(fields: Fields) -> dict[str, Any]:
    attention, mlp = fields.flag("attention_bias"), fields.flag("mlp_bias")
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp}


FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        layers=_alike,
        traits=_biases,
        fixed=_SILU | {"sliding_window": ()},
    ),
)
