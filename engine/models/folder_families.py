"""The families as their config.json describes them. The definitions are Hugging Face's own models.

`defaults` are what their configuration classes say where a file says nothing, as far as it counts for the
arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.models.config import (
    Activation,
    Experts,
    Layer,
    NormPlacement,
    QKNorm,
    Rope,
    Routing,
    TemperatureTuning,
)
from engine.models.folder_layers import (
    MAX_CONTEXT,
    alternating,
    kinds,
    read_layers,
    rotates,
    window_of,
    windowed,
)
from engine.models.rotary_fields import read_rope
from engine.models.shape import Family

if TYPE_CHECKING:
    from engine.models.fields import Fields

_SILU: dict[str, tuple[object, ...]] = {"is_encoder_decoder": (False,), "hidden_act": ("silu",)}
_GELU: dict[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False,),
}
_GEMMA = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}


def _alike(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    return (Layer(rope=read_rope(fields, head_dim)),) * count


def _all_windowed(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    return (Layer(rope=read_rope(fields, head_dim), window=window_of(fields)),) * count


def _phi3_layers(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    rope = read_rope(fields, head_dim, partial=True)
    return (Layer(rope=rope, window=window_of(fields)),) * count


def _qwen_layers(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    """The first `max_window_layers` see everything."""
    window = windowed(fields)
    first = fields.count("max_window_layers", least=0) if window else count
    default = ["full_attention" if index < first else "sliding_attention" for index in range(count)]
    return read_layers(read_rope(fields, head_dim), kinds(fields, default), window)


def _smollm3_layers(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    rotated, window = rotates(fields, count), windowed(fields)
    default = ["sliding_attention" if window and not turns else "full_attention" for turns in rotated]
    layers = read_layers(read_rope(fields, head_dim), kinds(fields, default), window)
    return tuple(
        layer if turns else replace(layer, rope=None) for layer, turns in zip(layers, rotated, strict=True)
    )


def _gemma2_layers(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    window = window_of(fields)
    return read_layers(read_rope(fields, head_dim), kinds(fields, alternating(count, 2)), window)


def _gemma3_layers(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    """Local layers have a window and positions of their own, which are never stretched by `rope_scaling`."""
    found = kinds(fields, alternating(count, fields.count("sliding_window_pattern", 6)))
    window = window_of(fields) if "sliding_attention" in found else 0
    everywhere = Layer(rope=read_rope(fields, head_dim, layer_type="full_attention"))
    local = Layer(rope=_gemma3_local_rope(fields, head_dim), window=window)
    return tuple(local if kind == "sliding_attention" else everywhere for kind in found)


def _gemma3_local_rope(fields: Fields, head_dim: int) -> Rope:
    theta = fields.number("rope_local_base_freq", 10000.0)
    written = fields.within("rope_parameters").values
    if "sliding_attention" not in written:
        return Rope(theta=theta, num_rotated=head_dim)
    own = replace(fields, values={**fields.values, "rope_theta": theta, "rope_scaling": None})
    return read_rope(own, head_dim, layer_type="sliding_attention")


def _llama4_layers(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    """Layers that rotate see a chunk, the others everything. Only where no layer has experts."""
    sparse = fields.values.get("moe_layers")
    step = fields.count("interleave_moe_layer_step", 1, least=0)
    experts = fields.count("num_local_experts", 16, least=0)
    if sparse is None:
        sparse = list(range(step - 1, count, step)) if step and experts else []
    if sparse:
        raise fields.unsupported("moe_layers", sparse, "; Llama 4 is, without experts")
    rotated = rotates(fields, count)
    found = kinds(
        fields,
        ["chunked_attention" if turns else "full_attention" for turns in rotated],
        known=("chunked_attention", "full_attention"),
    )
    rope = read_rope(fields, head_dim)
    chunk = fields.count("attention_chunk_size") if "chunked_attention" in found else 0
    return tuple(
        Layer(rope=rope if turns else None, chunk=chunk if kind == "chunked_attention" else 0)
        for turns, kind in zip(rotated, found, strict=True)
    )


def _mixtral_layers(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    return tuple(replace(layer, experts=True) for layer in _all_windowed(fields, head_dim, count))


def _qwen3_moe_layers(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    """Every `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`."""
    dense = fields.values.get("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple) or not all(type(index) is int for index in dense):
        raise fields.unsupported("mlp_only_layers", dense)
    dense = frozenset(dense)
    step, window = fields.count("decoder_sparse_step", 1), windowed(fields)
    layer = Layer(rope=read_rope(fields, head_dim), window=window)
    return tuple(
        replace(layer, experts=index not in dense and (index + 1) % step == 0) for index in range(count)
    )


def _gpt_oss_layers(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    rope, window = read_rope(fields, head_dim), window_of(fields)
    layers = read_layers(rope, kinds(fields, alternating(count, 2)), window)
    return tuple(replace(layer, experts=True) for layer in layers)


def _biases(fields: Fields) -> dict[str, Any]:
    attention, mlp = fields.flag("attention_bias"), fields.flag("mlp_bias")
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp}


def _attention_biases(fields: Fields) -> dict[str, Any]:
    return {"qkv_bias": fields.flag("attention_bias"), "out_bias": fields.flag("attention_bias")}


def _gemma(fields: Fields) -> dict[str, Any]:
    soft_caps = {
        name: fields.number(field) if fields.has(field) else 0.0
        for name, field in (
            ("attention_soft_cap", "attn_logit_softcapping"),
            ("logit_soft_cap", "final_logit_softcapping"),
        )
    }
    return (
        _attention_biases(fields)
        | soft_caps
        | {
            "norm_placement": NormPlacement.SANDWICH,
            "norm_offset": True,
            "activation": Activation.GELU_TANH,
            "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
            "embedding_scale": fields.count("hidden_size") ** 0.5,
        }
    )


def _llama4(fields: Fields) -> dict[str, Any]:
    tuning = None
    if fields.flag("attn_temperature_tuning", True):
        floor, scale = fields.count("floor_scale", 8192), fields.number("attn_scale", 0.1)
        tuning = TemperatureTuning(floor=floor, scale=scale)
    return _attention_biases(fields) | {
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


def _mixtral(fields: Fields) -> dict[str, Any]:
    routing = Routing.SOFTMAX_CHOSEN
    return {"experts": _experts(fields, "num_local_experts", "intermediate_size", routing=routing)}


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    routing = Routing.SOFTMAX_CHOSEN if fields.flag("norm_topk_prob") else Routing.SOFTMAX_ALL
    count = "num_experts" if fields.has("num_experts") else "num_local_experts"
    experts = _experts(fields, count, "moe_intermediate_size", routing=routing)
    return _attention_biases(fields) | {"qk_norm": QKNorm.HEAD, "experts": experts}


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    routing = Routing.SOFTMAX_CHOSEN
    count = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
    return _attention_biases(fields) | {
        "sinks": True,
        "activation": Activation.CLAMPED_SWISH,
        "experts": _experts(fields, count, "intermediate_size", routing=routing, bias=True),
    }


_GEMMA3 = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    layers=_gemma3_layers,
    traits=lambda fields: _gemma(fields) | {"qk_norm": QKNorm.HEAD},
    defaults=_GEMMA
    | {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "rope_theta": 1e6, "max_position_embeddings": MAX_CONTEXT,
    },
    fixed=_GELU | {"attn_logit_softcapping": ()},
)  # fmt: skip

FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        layers=_alike,
        traits=_biases,
        fixed=_SILU | {"sliding_window": ()},
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        layers=_all_windowed,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": MAX_CONTEXT},
        fixed=_SILU | {"layer_types": ()},
    ),
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        layers=_smollm3_layers,
        traits=_biases,
        defaults={
            "num_key_value_heads": 4, "rope_theta": 2e6, "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        fixed=_SILU,
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        layers=_qwen_layers,
        traits=lambda fields: {"qkv_bias": True},
        defaults=_QWEN,
        fixed=_SILU,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        layers=_qwen_layers,
        traits=lambda fields: _attention_biases(fields) | {"qk_norm": QKNorm.HEAD},
        defaults=_QWEN | {"head_dim": 128},
        fixed=_SILU,
    ),
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        layers=_qwen3_moe_layers,
        traits=_qwen3_moe,
        defaults=_QWEN
        | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8},
        fixed=_SILU | {"layer_types": ()},
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        layers=_mixtral_layers,
        traits=_mixtral,
        defaults={
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8,
            "num_experts_per_tok": 2, "max_position_embeddings": MAX_CONTEXT,
        },
        fixed=_SILU | {"layer_types": ()},
    ),
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        layers=_gemma2_layers,
        traits=_gemma,
        defaults=_GEMMA
        | {
            "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        fixed=_GELU,
    ),
    _GEMMA3,
    replace(_GEMMA3, architecture="Gemma3ForConditionalGeneration", nested="text_config"),
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        layers=_phi3_layers,
        defaults={
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        },
        fixed=_SILU | {"attention_bias": (False,), "mlp_bias": (False,), "layer_types": ()},
    ),
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        layers=_alike,
        traits=lambda fields: _attention_biases(fields)
        | {"norm_placement": NormPlacement.POST, "qk_norm": QKNorm.WHOLE},
        defaults={"rms_norm_eps": 1e-5},
        fixed=_SILU | {"sliding_window": (), "clip_qkv": ()},
    ),
    Family(
        name="gpt-oss",
        architecture="GptOssForCausalLM",
        layers=_gpt_oss_layers,
        traits=_gpt_oss,
        defaults={
            "head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128, "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0, "max_position_embeddings": MAX_CONTEXT, "attention_bias": True,
            "num_experts_per_tok": 4,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 4096,
            },
        },
        fixed=_SILU | {"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    ),
    Family(
        name="llama4",
        architecture="Llama4ForCausalLM",
        layers=_llama4_layers,
        traits=_llama4,
        defaults={
            "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "max_position_embeddings": MAX_CONTEXT, "attention_chunk_size": 8192, "intermediate_size": 8192,
        },
        fixed=_SILU,
    ),
)  # fmt: skip
