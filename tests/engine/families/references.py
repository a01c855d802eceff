"""Tiny random models of every family, by Hugging Face's own classes: what we must compute as they do.

Weights are spiky on purpose: norms, biases, sinks and routers lie far from where initialisers put them, so
that a term that is forgotten or put in another place shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 131
WINDOW = 24  # tokens: shorter than the texts, and no multiple of a page
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LOCAL_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
    "truncate": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`fields` differ from SIZES. `gguf`: the name of the architecture there, "" where it has none."""

    kind: str  # of the classes: LlamaConfig, LlamaForCausalLM
    gguf: str
    fields: dict[str, Any] = field(default_factory=dict)
    config: str = ""  # of the configuration's class where it has another name


def longrope(num_rotated: int, original: int) -> dict[str, Any]:
    half = num_rotated // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * index for index in range(half)],
        "long_factor": [1.0 + 0.7 * index for index in range(half)],
        "original_max_position_embeddings": original,
    }


CASES = {
    "llama": Case("Llama", "llama"),
    "llama3": Case("Llama", "llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}),
    "llama_biases": Case("Llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": Case("Llama", "llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": Case("Mistral", "", {"sliding_window": WINDOW}),
    "mistral_wide": Case("Mistral", "llama", {"sliding_window": None, "head_dim": 24}),
    "smollm3": Case("SmolLM3", "smollm3", {"tie_word_embeddings": True}),
    "smollm3_local": Case(
        "SmolLM3", "", {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layers": [0, 1, 1, 0]}
    ),
    "qwen2": Case("Qwen2", "qwen2"),
    "qwen2_local": Case(
        "Qwen2", "", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
    ),
    "qwen3": Case("Qwen3", "qwen3", {"head_dim": 16}),
    "qwen3_local": Case(
        "Qwen3",
        "",
        {
            "head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LOCAL_GLOBAL,
            "attention_bias": True,
        },
    ),
    "qwen3_moe": Case(
        "Qwen3Moe",
        "qwen3moe",
        {
            "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_mixed": Case(
        "Qwen3Moe",
        "",
        {
            "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
            "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3],
            "use_sliding_window": True, "sliding_window": WINDOW,
        },
    ),
    "mixtral": Case("Mixtral", "llama", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral_local": Case(
        "Mixtral", "", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}
    ),
    "gemma2": Case(
        "Gemma2",
        "gemma2",
        {
            "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0, "tie_word_embeddings": True,
        },
    ),
    "gemma2_scaled": Case(
        "Gemma2",
        "",
        {
            "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": True,
        },
    ),
    "gemma3": Case(
        "Gemma3",
        "gemma3",
        {
            "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "num_hidden_layers": 7,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "Gemma3Text",
    ),
    "phi3": Case("Phi3", "phi3", {"sliding_window": WINDOW, "original_max_position_embeddings": 512}),
    "phi4_mini": Case(
        "Phi3",
        "phi3",
        {
            "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
            "rope_parameters": longrope(12, 64),
        },
    ),
    "olmo2": Case("Olmo2", "olmo2"),
    "gpt_oss": Case(
        "GptOss",
        "gpt-oss",
        {
            "head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 5, "num_experts_per_tok": 2,
            "rope_parameters": YARN_ROPE,
        },
    ),
    "llama4": Case(
        "Llama4",
        "",
        {
            "head_dim": 16, "intermediate_size_mlp": 56, "intermediate_size": 40, "moe_layers": [],
            "interleave_moe_layer_step": 0, "num_local_experts": 0, "attention_chunk_size": 40,
            "floor_scale": 16, "attn_scale": 0.5, "rope_parameters": LLAMA3_ROPE,
        },
        "Llama4Text",
    ),
    "mobilellm_r1": Case(
        "Llama4",
        "llama4",
        {
            "head_dim": 16, "intermediate_size_mlp": 56, "intermediate_size": 56, "moe_layers": [],
            "interleave_moe_layer_step": 0, "num_local_experts": 0, "no_rope_layers": [1, 1, 1, 1],
            "layer_types": ["full_attention"] * 4, "attn_temperature_tuning": False,
            "tie_word_embeddings": True,
        },
        "Llama4Text",
    ),
}  # fmt: skip


def build(case: Case) -> PreTrainedModel:
    torch.manual_seed(3)
    config_class = getattr(transformers, f"{case.config or case.kind}Config")
    config = config_class(**SIZES | case.fields, attn_implementation="eager")
    model = getattr(transformers, f"{case.kind}ForCausalLM")(config).eval().float()
    make_spiky(model)
    return model


@torch.no_grad()
def make_spiky(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(4)
    offset = 0.0 if model.config.model_type.startswith("gemma") else 1.0

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(offset + 0.4 * noise(parameter))
        elif "sinks" in name:
            parameter.copy_(1.5 * noise(parameter))
        elif name.endswith("bias"):
            parameter.copy_(0.4 * noise(parameter))
        elif "embed_tokens" in name:
            parameter.copy_(0.5 * noise(parameter))
        else:
            spread = 1.5 if "q_proj" in name or "k_proj" in name or "qkv" in name else 1.0
            parameter.copy_(spread * noise(parameter) / model.config.hidden_size**0.5)


@torch.inference_mode()
def logits_of(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """float32 [T, vocab], of the whole text at once"""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


@torch.inference_mode()
def logits_one_by_one(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """float32 [T, vocab], of a text that is computed token by token"""
    cache, rows = None, []
    for token in tokens:
        output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1])
    return torch.stack(rows)
