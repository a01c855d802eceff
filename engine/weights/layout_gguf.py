"""What GGUF files call the tensors, as the converter of llama.cpp writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.weights.layout_folder import adapter_modules, folder_names
from engine.weights.layout_targets import Spelling, targets

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from engine.models.config import TransformerConfig
    from engine.weights.layout import Target

_TOP = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
_LAYER = {
    "attention_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
    "qkv": "attn_qkv",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "out": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "sinks": "attn_sinks",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "router": "ffn_gate_inp",
    "expert_gate": "ffn_gate.{expert}",
    "expert_up": "ffn_up.{expert}",
    "expert_down": "ffn_down.{expert}",
    "experts_gate_up": "ffn_gate_up_exps",
    "experts_gate": "ffn_gate_exps",
    "experts_up": "ffn_up_exps",
    "experts_down": "ffn_down_exps",
}
# Where a family differs; an empty name: it has no such tensor.
_OWN: Mapping[str, Mapping[str, str]] = {
    "phi3": {"gate_up": "ffn_up", "gate": "", "up": ""},
    "gpt-oss": {
        "mlp_norm": "post_attention_norm",
        **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), ""),
    },
}
# The converter brings the two rows of a rotary pair side by side, or finds them so.
_NEIGHBOURS = ("llama", "mixtral", "llama4", "smollm3")


def gguf_targets(config: TransformerConfig, names: Collection[str]) -> Iterator[Target]:
    """The tensors of the model, from those of a GGUF file."""
    layer = {**_LAYER, **_OWN.get(config.architecture, {})}
    stored = {role: f"blk.{{layer}}.{name}.weight" for role, name in layer.items() if name}
    spelling = Spelling(
        stored=stored | _TOP,
        modules=adapter_modules(config, folder_names(config)),
        neighbours=config.architecture in _NEIGHBOURS,
    )
    return targets(config, names, spelling)
