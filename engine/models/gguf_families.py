"""The families as GGUF metadata describes them, as the converter of llama.cpp writes it. No torch here.

What a file does not say follows from its architecture, as llama.cpp has it; where llama.cpp itself leaves
something out that the model has (Phi-3's window), the model's own definition counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.models import gguf_layers as layers
from engine.models import gguf_traits as traits
from engine.models.config import NormPlacement, QKNorm, TransformerConfig
from engine.models.fields import Fields, decimal
from engine.models.gguf_header import Header
from engine.models.gguf_rotary import ROPE_KEYS
from engine.models.shape import layer_count, reach

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from engine.models.config import Layer

# Keys under "<architecture>." that every family reads, or that change nothing.
_KEYS = ROPE_KEYS | {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "tensor_data_layout", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
}  # fmt: skip
_EXPERT_KEYS = frozenset(
    {
        "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func",
        "expert_weights_norm",
    }
)  # fmt: skip
_WINDOW_KEYS = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
_BESIDE_THE_TEXT = ("vision.", "mm.")  # of an image's encoder and its way into the text
_SOFT_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """`keys` are those that it reads beyond the common ones; any other must be absent or zero."""

    name: str
    architecture: str
    layers: Callable[[Header], tuple[Layer, ...]]
    traits: Callable[[Header], dict[str, Any]] = lambda header: {}
    keys: frozenset[str] = frozenset()


def read_gguf_config(
    family: GGUFFamily,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    factors: Mapping[str, tuple[float, ...]],
) -> TransformerConfig:
    """Raises CheckpointError."""
    prefix = f"{family.architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields("metadata", own, prefix)
    known = _KEYS | family.keys
    for key, value in own.items():
        if value and key not in known and not key.startswith(_BESIDE_THE_TEXT):
            raise fields.unsupported(key, value)
    hidden_size, num_heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", max(1, hidden_size // num_heads))
    fields.check("attention.value_length", head_dim)
    header = Header(fields, tensors, factors, head_dim, layer_count(fields, "block_count"))
    entries = family.layers(header)
    common = TransformerConfig(
        architecture=family.name,
        vocab_size=_vocab_size(metadata, fields),
        hidden_size=hidden_size,
        intermediate_size=header.intermediate_size(),
        layers=entries,
        num_heads=num_heads,
        num_kv_heads=fields.count("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=decimal(fields.number("attention.layer_norm_rms_epsilon")),
        max_positions=reach(fields.count("context_length"), entries),
        qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
    )
    return replace(common, **family.traits(header))


def _vocab_size(metadata: Mapping[str, Any], fields: Fields) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, tuple) and tokens else fields.count("vocab_size")


GGUF_FAMILIES = (
    GGUFFamily(
        name="llama", architecture="llama", layers=layers.llama, traits=traits.llama, keys=_EXPERT_KEYS
    ),
    GGUFFamily(name="smollm3", architecture="smollm3", layers=layers.smollm3),
    GGUFFamily(name="qwen2", architecture="qwen2", layers=layers.alike),
    GGUFFamily(
        name="qwen3",
        architecture="qwen3",
        layers=layers.alike,
        traits=lambda header: {"qk_norm": QKNorm.HEAD},
    ),
    GGUFFamily(
        name="qwen3_moe",
        architecture="qwen3moe",
        layers=layers.all_experts,
        traits=lambda header: {"qk_norm": QKNorm.HEAD, "experts": traits.experts(header)},
        keys=_EXPERT_KEYS,
    ),
    GGUFFamily(
        name="gemma2",
        architecture="gemma2",
        layers=layers.gemma2,
        traits=traits.gemma2,
        keys=_WINDOW_KEYS | _SOFT_CAPS,
    ),
    GGUFFamily(
        name="gemma3",
        architecture="gemma3",
        layers=layers.gemma3,
        traits=traits.gemma3,
        keys=_WINDOW_KEYS | {"final_logit_softcapping", "rope.freq_base_swa"},
    ),
    GGUFFamily(
        name="phi3", architecture="phi3", layers=layers.phi3, keys=frozenset({"attention.sliding_window"})
    ),
    GGUFFamily(
        name="olmo2",
        architecture="olmo2",
        layers=layers.alike,
        traits=lambda header: {"norm_placement": NormPlacement.POST, "qk_norm": QKNorm.WHOLE},
    ),
    GGUFFamily(
        name="gpt-oss",
        architecture="gpt-oss",
        layers=layers.gpt_oss,
        traits=traits.gpt_oss,
        keys=_EXPERT_KEYS | _WINDOW_KEYS,
    ),
    GGUFFamily(
        name="llama4",
        architecture="llama4",
        layers=layers.llama4,
        traits=traits.llama4,
        keys=_EXPERT_KEYS | _WINDOW_KEYS | {"interleave_moe_layer_step", "leading_dense_block_count"},
    ),
)
