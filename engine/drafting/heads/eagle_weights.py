"""The tensors of an EAGLE head: its first layer has no norm before its attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafting.heads.head_layers import layer_targets, refuse_others, stored, take_layers
from engine.drafting.heads.heads import FusingHead
from engine.models.transformer import NORMED

if TYPE_CHECKING:
    from engine.drafting.heads.checkpoint_parts import CheckpointParts
    from engine.drafting.heads.eagle_config import EagleConfig
    from engine.drafting.surroundings import Surroundings

FUSES = ("fc", "model.fc", "fusion_fc")
_EMBEDDING_NORMS = ("embedding_layernorm.weight", "model.embedding_layernorm.weight")
_FEATURE_NORMS = ("hidden_states_layernorm.weight", "model.hidden_states_layernorm.weight")


def read_eagle(parts: CheckpointParts, config: EagleConfig, layer: str, around: Surroundings) -> FusingHead:
    """Embeddings and vocabulary are the target's. Raises CheckpointError."""
    hidden = around.model.config.hidden_size
    layers = [
        target
        for target in layer_targets(config.layers, parts.names, layer)
        if target.name != "layers.0.attention_norm"
    ]
    norm = f"{layer.format(layer=0)}input_layernorm.weight"  # where it is stored, nobody uses it
    refuse_others(parts, layer.partition("{")[0], layers, (norm,))
    fuse = next((name for name in FUSES if f"{name}.weight" in parts.names), FUSES[0])
    others = [stored("fuse", f"{fuse}.weight", hidden, 2 * hidden)]
    if f"{fuse}.bias" in parts.names:
        others.append(stored("fuse_bias", f"{fuse}.bias", hidden))
    for role, spellings in (("embedding_norm", _EMBEDDING_NORMS), ("feature_norm", _FEATURE_NORMS)):
        others += [stored(role, name, hidden) for name in spellings if name in parts.names]
    weights = parts.load([*layers, *others], around.dtype, around.device)
    return FusingHead(
        layers=take_layers(config.layers, weights, around.ops),
        target=around.model,
        taps=(NORMED,),
        fuse=weights["fuse"],
        fuse_bias=weights.get("fuse_bias"),
        embedding_norm=weights.get("embedding_norm"),
        feature_norm=weights.get("feature_norm"),
    )
