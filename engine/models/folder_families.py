"""The families as their config.json describes them. The definitions are Hugging Face's own models.

`defaults` are what their configuration classes say where a file says nothing, as far as it counts for the
arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

from engine.models import folder_layers as layers
from engine.models import folder_traits as traits
from engine.models.config import NormPlacement, QKNorm
from engine.models.shape import Family

_MAX_CONTEXT = 131072  # what several families' configuration classes assume
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

_GEMMA3 = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    layers=layers.gemma3,
    traits=lambda fields: traits.gemma(fields) | {"qk_norm": QKNorm.HEAD},
    defaults=_GEMMA
    | {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "rope_theta": 1e6, "max_position_embeddings": _MAX_CONTEXT,
    },
    fixed=_GELU | {"attn_logit_softcapping": ()},
)  # fmt: skip

_QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    layers=layers.qwen,
    traits=lambda fields: {"qkv_bias": True},
    defaults=_QWEN,
    fixed=_SILU,
)

FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        model_type="llama",
        layers=layers.alike,
        traits=traits.biases,
        fixed=_SILU | {"sliding_window": ()},
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        model_type="mistral",
        layers=layers.all_windowed,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": _MAX_CONTEXT},
        fixed=_SILU | {"layer_types": ()},
    ),
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        model_type="smollm3",
        layers=layers.smollm3,
        traits=traits.biases,
        defaults={
            "num_key_value_heads": 4, "rope_theta": 2e6, "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        fixed=_SILU,
    ),
    _QWEN2,
    # And a head that predicts the token after the next.
    replace(_QWEN2, architecture="MiMoForCausalLM", model_type="mimo"),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        layers=layers.qwen,
        traits=lambda fields: traits.attention_biases(fields) | {"qk_norm": QKNorm.HEAD},
        defaults=_QWEN | {"head_dim": 128},
        fixed=_SILU,
    ),
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        layers=layers.qwen3_moe,
        traits=traits.qwen3_moe,
        defaults=_QWEN
        | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8},
        fixed=_SILU | {"layer_types": ()},
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        layers=layers.mixtral,
        traits=traits.mixtral,
        defaults={
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8,
            "num_experts_per_tok": 2, "max_position_embeddings": _MAX_CONTEXT,
        },
        fixed=_SILU | {"layer_types": ()},
    ),
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        layers=layers.gemma2,
        traits=traits.gemma,
        defaults=_GEMMA
        | {
            "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        fixed=_GELU,
    ),
    _GEMMA3,
    replace(
        _GEMMA3, architecture="Gemma3ForConditionalGeneration", model_type="gemma3", nested="text_config"
    ),
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        layers=layers.phi3,
        defaults={
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        },
        fixed=_SILU | {"attention_bias": (False,), "mlp_bias": (False,), "layer_types": ()},
    ),
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        model_type="olmo2",
        layers=layers.alike,
        traits=lambda fields: traits.attention_biases(fields)
        | {"norm_placement": NormPlacement.POST, "qk_norm": QKNorm.WHOLE},
        defaults={"rms_norm_eps": 1e-5},
        fixed=_SILU | {"sliding_window": (), "clip_qkv": ()},
    ),
    Family(
        name="gpt-oss",
        architecture="GptOssForCausalLM",
        model_type="gpt_oss",
        layers=layers.gpt_oss,
        traits=traits.gpt_oss,
        defaults={
            "head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128, "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0, "max_position_embeddings": _MAX_CONTEXT, "attention_bias": True,
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
        model_type="llama4_text",
        layers=layers.llama4,
        traits=traits.llama4,
        defaults={
            "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "max_position_embeddings": _MAX_CONTEXT, "attention_chunk_size": 8192, "intermediate_size": 8192,
        },
        fixed=_SILU,
    ),
)  # fmt: skip
