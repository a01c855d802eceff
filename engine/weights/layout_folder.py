"""What Hugging Face's models call their tensors, family by family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.models.config import NormPlacement
from engine.weights.layout_order import (
    alternating_columns_to_rows,
    alternating_to_halves,
    columns_to_rows,
)
from engine.weights.layout_targets import Spelling, targets

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from engine.models.config import TransformerConfig
    from engine.weights.layout import Target

_LAYER = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "out": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "sinks": "self_attn.sinks",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "router": "mlp.gate.weight",
    "expert_gate": "mlp.experts.{expert}.gate_proj.weight",
    "expert_up": "mlp.experts.{expert}.up_proj.weight",
    "expert_down": "mlp.experts.{expert}.down_proj.weight",
    "experts_gate_up": "mlp.experts.gate_up_proj",
    "experts_down": "mlp.experts.down_proj",
}
_NORMS = {
    NormPlacement.PRE: {
        "attention_norm": "input_layernorm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
    },
    NormPlacement.POST: {
        "attention_post_norm": "post_attention_layernorm.weight",
        "mlp_post_norm": "post_feedforward_layernorm.weight",
    },
    NormPlacement.SANDWICH: {
        "attention_norm": "input_layernorm.weight",
        "attention_post_norm": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "mlp_post_norm": "post_feedforward_layernorm.weight",
    },
}
# Where a family differs; an empty name: it has no such tensor.
_OWN: Mapping[str, Mapping[str, str]] = {
    "llama4": {role: _LAYER[role].replace("mlp", "feed_forward") for role in ("gate", "up", "down")},
    "phi3": {
        "qkv": "self_attn.qkv_proj.weight",
        "gate_up": "mlp.gate_up_proj.weight",
        **dict.fromkeys(("q", "k", "v", "gate", "up"), ""),
    },
    "mixtral": {
        "router": "block_sparse_moe.gate.weight",
        "expert_gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "expert_up": "block_sparse_moe.experts.{expert}.w3.weight",
        "expert_down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    "gpt-oss": {
        "router": "mlp.router.weight",
        **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), ""),
    },
}
# (the decoder's prefix, its head): a text model, or one within a model that also sees.
_ROOTS = (
    ("model.", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
)


def folder_targets(config: TransformerConfig, names: Collection[str]) -> Iterator[Target]:
    """The tensors of the model, from those of a folder of safetensors files."""
    root, head = next((known for known in _ROOTS if f"{known[0]}embed_tokens.weight" in names), _ROOTS[0])
    stored = folder_names(config, root) | {"head": head}
    if config.architecture == "mixtral" and root + "layers.0.mlp.gate.weight" in names:
        stored["router"] = root + "layers.{layer}.mlp.gate.weight"  # as newer files have it
    columns = config.architecture == "gpt-oss"
    spelling = Spelling(
        stored=stored,
        modules=adapter_modules(config, stored),
        neighbours=config.architecture == "llama4",
        columns=columns,
        orders={
            "experts_gate_up": (alternating_columns_to_rows, alternating_to_halves),
            "experts_down": (columns_to_rows, None),
        }
        if columns
        else {},
    )
    return targets(config, names, spelling)


def folder_names(config: TransformerConfig, root: str = "model.") -> dict[str, str]:
    """Role -> name of the weight, with "{layer}" and "{expert}" in it."""
    layer = {**_LAYER, **_NORMS[config.norm_placement], **_OWN.get(config.architecture, {})}
    names = {role: f"{root}layers.{{layer}}.{name}" for role, name in layer.items() if name}
    top = {"embedding": f"{root}embed_tokens.weight", "final_norm": f"{root}norm.weight"}
    return names | top | {"head": "lm_head.weight"}


def adapter_modules(config: TransformerConfig, names: Mapping[str, str]) -> dict[str, str]:
    """Role -> module that an adapter may name. An adapter's rows are in the order of Hugging Face's model,
    which for Llama 4's queries and keys is not the runtime's."""
    turned = ("q", "k") if config.architecture == "llama4" else ()
    return {
        role: name.removesuffix(".weight")
        for role, name in names.items()
        if name.endswith(".weight") and role not in turned
    }
