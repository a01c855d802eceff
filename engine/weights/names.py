"""The tensors that a transformer needs: their canonical (Hugging Face Llama) names and their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.models.config import TransformerConfig

Shape = tuple[int, ...]

_GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def expected_shapes(config: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    """Every tensor of the model, in the order of the layers. Lazy: a hostile count costs nothing."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{index}.{name}", shape
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def gguf_name(name: str) -> str:
    """What GGUF calls the tensor with this canonical name."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    _, _, index, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{_GGUF_LAYER[module]}.{kind}"


def _layer_shapes(config: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    for names, rows, columns, bias in (
        (("self_attn.q_proj",), queries, hidden, config.attention_bias),
        (("self_attn.k_proj", "self_attn.v_proj"), keys, hidden, config.attention_bias),
        (("self_attn.o_proj",), hidden, queries, config.attention_bias),
        (("mlp.gate_proj", "mlp.up_proj"), inner, hidden, config.mlp_bias),
        (("mlp.down_proj",), hidden, inner, config.mlp_bias),
    ):
        for name in names:
            yield f"{name}.weight", (rows, columns)
            if bias:
                yield f"{name}.bias", (rows,)
