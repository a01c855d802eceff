"""Writes a reference model as the GGUF file that llama.cpp's converter makes of it, in float32.

Names come from gguf's own table and keys from its writer, so that ours are not compared with themselves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import gguf
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

PERMUTED = ("llama", "smollm3")


def write_gguf(model: PreTrainedModel, architecture: str, path: Path, *, experts_apart: bool = False) -> None:
    """`experts_apart`: a tensor for each expert, as the first files of Mixtral had."""
    config = model.config.to_dict()
    writer = gguf.GGUFWriter(path, architecture)
    write_sizes(writer, config)
    write_positions(writer, config, architecture)
    write_specialities(writer, config, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{token}>" for token in range(config["vocab_size"])])
    known = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, config["num_hidden_layers"])
    for name, tensor in converted(model, architecture):
        if experts_apart and "_exps" in (names.get_name(name, (".weight",)) or ""):
            for number, one in enumerate(tensor):
                single = names.get_name(name, (".weight",)).replace("_exps", f".{number}")
                writer.add_tensor(single, one.contiguous().numpy())
        else:
            found = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
            writer.add_tensor(found, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config.get("intermediate_size_mlp", config["intermediate_size"]))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if (count := config.get("num_local_experts", config.get("num_experts"))) is not None:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])


def write_positions(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_size(config) * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif architecture == "phi3":
        original = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def write_specialities(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    if architecture in ("gemma2", "gemma3", "gpt-oss", "phi3"):
        writer.add_sliding_window(config["sliding_window"] or 0)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if architecture in ("gpt-oss", "llama4"):
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if architecture == "llama4":
        writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
        writer.add_sliding_window(0)


def converted(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in Hugging Face's spelling, or GGUF's own; values in the file's order)"""
    config = model.config.to_dict()
    yield from rotary_factors(config)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if ".experts." in name:
            yield from expert_parts(name, tensor, architecture)
            continue
        value = tensor
        if architecture in PERMUTED and ".q_proj." in name:
            value = permuted(tensor, config["num_attention_heads"])
        elif architecture in PERMUTED and ".k_proj." in name:
            value = permuted(tensor, config["num_key_value_heads"])
        elif architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = tensor + 1
        yield name + ".weight" * name.endswith("sinks"), value


def expert_parts(name: str, tensor: torch.Tensor, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Gate and up apart, [E, out, in]."""
    base, kind = (name.removesuffix("_bias"), ".bias") if name.endswith("_bias") else (name, ".weight")
    oss = architecture == "gpt-oss"
    if oss and kind == ".weight":
        tensor = tensor.transpose(1, 2)
    if not base.endswith("gate_up_proj"):
        yield base + kind, tensor
        return
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if oss else tensor.chunk(2, dim=1)
    yield base.replace("gate_up_proj", "gate_proj") + kind, gate
    yield base.replace("gate_up_proj", "up_proj") + kind, up


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Halves of a head -> the two of a rotary pair side by side."""
    return weights.reshape(heads, 2, -1, *weights.shape[1:]).transpose(1, 2).reshape(weights.shape)


def rotary_factors(config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"])
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"])
    if rope.get("rope_type") == "llama3":
        exponents = torch.arange(0, head_size(config), 2).float() / head_size(config)
        wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
        turns = rope["original_max_position_embeddings"] / wavelengths
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        yield "rope_freqs.weight", 1 / ((1 - smooth) / rope["factor"] + smooth)


def head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
