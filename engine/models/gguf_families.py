"""The families as GGUF metadata describes them, as the converter of llama.cpp writes it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.models.config import Layer, TransformerConfig
from engine.models.fields import Fields, decimal
from engine.models.gguf_rotary import ROPE_KEYS, read_rope
from engine.models.shape import layer_count, reach

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

# Keys under "<architecture>." that every family reads, or that change nothing.
_KEYS = ROPE_KEYS | {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "tensor_data_layout", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """`keys` are those that it reads beyond the common ones; any other must be absent or zero."""

    name: str
    architecture: str
    keys: frozenset[str] = frozenset()


GGUF_FAMILIES = (GGUFFamily(name="llama", architecture="llama"),)


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
    for key, value in own.items():
        if key not in _KEYS and key not in family.keys and value:
            raise fields.unsupported(key, value)
    hidden_size, num_heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", max(1, hidden_size // num_heads))
    fields.check("attention.value_length", head_dim)
    layers = (Layer(rope=read_rope(fields, head_dim, factors)),) * layer_count(fields, "block_count")
    return TransformerConfig(
        architecture=family.name,
        vocab_size=_vocab_size(metadata, fields),
        hidden_size=hidden_size,
        intermediate_size=fields.count("feed_forward_length"),
        layers=layers,
        num_heads=num_heads,
        num_kv_heads=fields.count("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=decimal(fields.number("attention.layer_norm_rms_epsilon")),
        max_positions=reach(fields.count("context_length"), layers),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
    )


def _vocab_size(metadata: Mapping[str, Any], fields: Fields) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, tuple) and tokens else fields.count("vocab_size")
