"""What else makes a family differ in GGUF files: fields of `TransformerConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.models.config import Activation, Experts, NormPlacement, QKNorm, TemperatureTuning
from engine.models.fields import decimal

if TYPE_CHECKING:
    from engine.models.fields import Fields
    from engine.models.gguf_header import Header

_SOFTMAX_GATING = (1, 3)  # over all experts, or over the chosen ones: the same once scaled to a sum of 1
_LLAMA4_TUNING = TemperatureTuning(floor=8192, scale=0.1)
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62  # which scale attention by hidden size over heads


def llama4(header: Header) -> dict[str, Any]:
    tuning = None if header.llama4_without_chunks else _LLAMA4_TUNING
    return {"qk_norm": QKNorm.UNIT, "temperature_tuning": tuning}


def _gemma(header: Header, largest: int) -> dict[str, Any]:
    """Stored norms have their offset added already."""
    fields, hidden_size = header.fields, header.fields.count("embedding_length")
    per_head = max(1, hidden_size // fields.count("attention.head_count"))
    return {
        "norm_placement": NormPlacement.SANDWICH,
        "activation": Activation.GELU_TANH,
        "attention_scale": (per_head if header.num_layers == largest else header.head_dim) ** -0.5,
        "logit_soft_cap": _soft_cap(fields, "final_logit_softcapping", 0.0),
        "embedding_scale": hidden_size**0.5,
    }


def gemma2(header: Header) -> dict[str, Any]:
    return _gemma(header, _GEMMA2_27B_LAYERS) | {
        "attention_soft_cap": _soft_cap(header.fields, "attn_logit_softcapping", 50.0),
        "logit_soft_cap": _soft_cap(header.fields, "final_logit_softcapping", 30.0),
    }


def _soft_cap(fields: Fields, name: str, default: float) -> float:
    return decimal(fields.number(name)) if fields.has(name) else default


def experts(header: Header, *, bias: bool = False) -> Experts:
    fields = header.fields
    fields.check("expert_gating_func", *_SOFTMAX_GATING)
    fields.check("expert_weights_norm", True)
    return Experts(
        count=fields.count("expert_count"),
        per_token=fields.count("expert_used_count"),
        intermediate_size=fields.count("expert_feed_forward_length", header.intermediate_size()),
        bias=bias,
    )


def llama(header: Header) -> dict[str, Any]:
    if not header.has_experts:
        return {}
    return {"architecture": "mixtral", "experts": experts(header)}


def gpt_oss(header: Header) -> dict[str, Any]:
    return {"experts": experts(header, bias=True), "sinks": True, "activation": Activation.CLAMPED_SWISH}


def gemma3(header: Header) -> dict[str, Any]:
    return _gemma(header, _GEMMA3_27B_LAYERS) | {"qk_norm": QKNorm.HEAD}
