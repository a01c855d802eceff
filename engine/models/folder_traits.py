"""What else makes a family differ, as its config.json says it: fields of `TransformerConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.models.config import Activation, Experts, NormPlacement, QKNorm, Routing, TemperatureTuning

if TYPE_CHECKING:
    from engine.models.fields import Fields


def biases(fields: Fields) -> dict[str, Any]:
    attention, mlp = fields.flag("attention_bias"), fields.flag("mlp_bias")
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp}


def attention_biases(fields: Fields) -> dict[str, Any]:
    return {"qkv_bias": fields.flag("attention_bias"), "out_bias": fields.flag("attention_bias")}


def gemma(fields: Fields) -> dict[str, Any]:
    soft_caps = {
        name: fields.number(field) if fields.has(field) else 0.0
        for name, field in (
            ("attention_soft_cap", "attn_logit_softcapping"),
            ("logit_soft_cap", "final_logit_softcapping"),
        )
    }
    return (
        attention_biases(fields)
        | soft_caps
        | {
            "norm_placement": NormPlacement.SANDWICH,
            "norm_offset": True,
            "activation": Activation.GELU_TANH,
            "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
            "embedding_scale": fields.count("hidden_size") ** 0.5,
        }
    )


def llama4(fields: Fields) -> dict[str, Any]:
    tuning = None
    if fields.flag("attn_temperature_tuning", True):
        floor, scale = fields.count("floor_scale", 8192), fields.number("attn_scale", 0.1)
        tuning = TemperatureTuning(floor=floor, scale=scale)
    return attention_biases(fields) | {
        "intermediate_size": fields.count("intermediate_size_mlp", 16384),
        "qk_norm": QKNorm.UNIT if fields.flag("use_qk_norm", True) else QKNorm.NONE,
        "temperature_tuning": tuning,
    }


def _experts(fields: Fields, count: str, size: str, *, routing: Routing, bias: bool = False) -> Experts:
    return Experts(
        count=fields.count(count),
        per_token=fields.count("num_experts_per_tok"),
        intermediate_size=fields.count(size),
        routing=routing,
        bias=bias,
    )


def mixtral(fields: Fields) -> dict[str, Any]:
    routing = Routing.SOFTMAX_CHOSEN
    return {"experts": _experts(fields, "num_local_experts", "intermediate_size", routing=routing)}


def qwen3_moe(fields: Fields) -> dict[str, Any]:
    routing = Routing.SOFTMAX_CHOSEN if fields.flag("norm_topk_prob") else Routing.SOFTMAX_ALL
    count = "num_experts" if fields.has("num_experts") else "num_local_experts"
    experts = _experts(fields, count, "moe_intermediate_size", routing=routing)
    return attention_biases(fields) | {"qk_norm": QKNorm.HEAD, "experts": experts}


def gpt_oss(fields: Fields) -> dict[str, Any]:
    routing = Routing.SOFTMAX_CHOSEN
    count = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
    return attention_biases(fields) | {
        "sinks": True,
        "activation": Activation.CLAMPED_SWISH,
        "experts": _experts(fields, count, "intermediate_size", routing=routing, bias=True),
    }
