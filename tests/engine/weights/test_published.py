"""Configurations as they were published: the fields of config.json that count, and what they must become."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.models.config import (
    Activation,
    NormPlacement,
    QKNorm,
    Routing,
    ScalingKind,
    TransformerConfig,
)
from engine.models.families import from_config_json
from engine.weights.errors import CheckpointError

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
    "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
MIMO_7B = {
    "architectures": ["MiMoForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 32768,
    "model_type": "mimo", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_theta": 640000, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151680,
}  # fmt: skip
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
GEMMA_2_27B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "intermediate_size": 36864,
    "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 46,
    "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
    "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "embd_pdrop": 0.0,
    "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
    "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144,
    "tie_word_embeddings": True, "vocab_size": 200064,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
}  # fmt: skip
OLMO_2_7B = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
    "vocab_size": 100352,
}  # fmt: skip
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
    "initial_context_length": 4096, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "vocab_size": 201088,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
}  # fmt: skip
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
    "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
LLAMA_4_SCOUT_TEXT = {
    "architectures": ["Llama4ForCausalLM"], "attention_chunk_size": 8192, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "interleave_moe_layer_step": 1, "no_rope_layers": [], "num_attention_heads": 40,
    "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16,
    "rms_norm_eps": 1e-05, "vocab_size": 202048, "use_qk_norm": True,
}  # fmt: skip


def shape_of(config: dict[str, Any], **change: Any) -> TransformerConfig:
    return from_config_json(config | change)


def windows(shape: TransformerConfig) -> list[int]:
    return [layer.window for layer in shape.layers]


def test_llama_3_2() -> None:
    shape = shape_of(LLAMA_3_2_1B)
    assert (shape.num_layers, shape.head_dim, shape.max_positions) == (16, 64, 131072)
    assert len(set(shape.layers)) == 1
    assert shape.kv_values_per_token == 2 * 16 * 8 * 64


def test_mistral() -> None:
    assert set(windows(shape_of(MISTRAL_7B))) == {4096}
    assert set(windows(shape_of(MISTRAL_7B, sliding_window=None))) == {0}


def test_qwen_2_5() -> None:
    shape = shape_of(QWEN2_5_7B)
    assert (shape.qkv_bias, shape.out_bias, set(windows(shape))) == (True, False, {0})
    assert windows(shape_of(QWEN2_5_7B, use_sliding_window=True, max_window_layers=26))[25:] == [
        0,
        131072,
        131072,
    ]
    # Beyond the context that it was trained for, as its card recommends.
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    assert shape_of(QWEN2_5_7B, rope_scaling=yarn).max_positions == 131072


def test_mimo() -> None:
    shape = shape_of(MIMO_7B)
    assert (shape.qkv_bias, shape.out_bias, set(windows(shape))) == (True, False, {0})
    assert (shape.num_layers, shape.head_dim) == (36, 128)


def test_qwen_3_with_experts() -> None:
    shape = shape_of(QWEN3_30B_A3B)
    assert shape.experts is not None
    assert (shape.experts.count, shape.experts.per_token, shape.experts.intermediate_size) == (128, 8, 768)
    assert shape.experts.routing is Routing.SOFTMAX_CHOSEN
    assert shape.qk_norm is QKNorm.HEAD
    assert all(layer.experts for layer in shape.layers)
    some = shape_of(QWEN3_30B_A3B, decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=False)
    assert [layer.experts for layer in some.layers[:6]] == [False, True, False, False, False, True]
    assert some.experts is not None
    assert some.experts.routing is Routing.SOFTMAX_ALL


def test_mixtral() -> None:
    shape = shape_of(MIXTRAL_8X7B)
    assert shape.experts is not None
    assert (shape.experts.count, shape.experts.per_token, shape.experts.intermediate_size) == (8, 2, 14336)


def test_gemma_2() -> None:
    shape = shape_of(GEMMA_2_27B)
    assert shape.attention_scale == 144**-0.5
    assert shape.embedding_scale == 4608**0.5
    assert (shape.attention_soft_cap, shape.logit_soft_cap) == (50.0, 30.0)
    assert windows(shape)[:4] == [4096, 0, 4096, 0]
    assert (shape.norm_placement, shape.norm_offset) == (NormPlacement.SANDWICH, True)
    assert shape.tie_embeddings
    assert shape.activation is Activation.GELU_TANH


def test_gemma_3() -> None:
    shape = shape_of(GEMMA_3_1B)
    assert windows(shape)[:7] == [512] * 5 + [0, 512]
    assert [layer.rope and layer.rope.theta for layer in shape.layers[4:6]] == [10000.0, 1000000.0]
    assert (shape.attention_soft_cap, shape.logit_soft_cap) == (0.0, 0.0)


def test_phi_4_mini() -> None:
    shape = shape_of(PHI_4_MINI)
    rope = shape.layers[0].rope
    assert rope is not None
    assert rope.num_rotated == 96
    assert rope.scaling is not None
    assert rope.scaling.kind is ScalingKind.LONGROPE
    assert rope.scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_olmo_2() -> None:
    shape = shape_of(OLMO_2_7B)
    assert (shape.norm_placement, shape.qk_norm) == (NormPlacement.POST, QKNorm.WHOLE)


def test_gpt_oss() -> None:
    shape = shape_of(GPT_OSS_20B)
    assert windows(shape)[:3] == [128, 0, 128]
    assert (shape.sinks, shape.qkv_bias, shape.out_bias) == (True, True, True)
    assert shape.experts is not None
    assert (shape.experts.count, shape.experts.bias) == (32, True)
    scaling = shape.layers[0].rope and shape.layers[0].rope.scaling
    assert scaling is not None
    assert (scaling.truncate, scaling.attention_factor) == (False, pytest.approx(0.1 * math.log(32) + 1))
    assert shape.max_positions == 131072


def test_smollm_3() -> None:
    shape = shape_of(SMOLLM3_3B)
    assert [layer.rope is None for layer in shape.layers[:5]] == [False, False, False, True, False]


def test_llama_4_with_experts_is_refused_in_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"moe_layers = \[0, 1.* models without experts"):
        shape_of(LLAMA_4_SCOUT_TEXT)
    dense = shape_of(LLAMA_4_SCOUT_TEXT, moe_layers=[])
    assert dense.intermediate_size == 16384
    assert [(layer.rope is None, layer.chunk) for layer in dense.layers[2:4]] == [(False, 8192), (True, 0)]


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (MISTRAL_7B, {"layer_types": ["full_attention"] * 32}, "layer_types"),
        (QWEN2_5_7B, {"layer_types": ["linear_attention"] * 28}, "layer_types = 'linear_attention'"),
        (QWEN2_5_7B, {"layer_types": ["full_attention"] * 3}, "28 values are needed"),
        (QWEN2_5_7B, {"use_sliding_window": "yes"}, "use_sliding_window = 'yes'"),
        (QWEN3_30B_A3B, {"mlp_only_layers": "3"}, "mlp_only_layers = '3'"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "129 experts per token of 128"),
        (MIXTRAL_8X7B, {"num_local_experts": 0}, "num_local_experts = 0"),
        (GEMMA_2_27B, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        (GEMMA_2_27B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA_3_1B, {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        (PHI_4_MINI, {"partial_rotary_factor": 0.01}, "partial_rotary_factor = 0.01 is not supported"),
        (PHI_4_MINI, {"partial_rotary_factor": 2.0}, "partial_rotary_factor = 2.0"),
        (PHI_4_MINI, {"partial_rotary_factor": 0.5}, "32 numbers are needed"),
        (PHI_4_MINI, {"attention_bias": True}, "attention_bias = True"),
        (OLMO_2_7B, {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        (GPT_OSS_20B, {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
        (SMOLLM3_3B, {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        (LLAMA_3_2_1B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            LLAMA_3_2_1B,
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}, "rope_scaling": None},
            "rope_parameters",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    config: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_config_json(config | change)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
