"""The decoder layers of a head as they are stored: those of a transformer, under names of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.models.layers import Layers
from engine.models.weights import take_layer
from engine.weights.errors import CheckpointError
from engine.weights.layout import Piece, Target
from engine.weights.layout_folder import folder_names
from engine.weights.layout_targets import Spelling, targets

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch

    from cuda_kernels.ops import Operations
    from engine.drafting.heads.checkpoint_parts import CheckpointParts
    from engine.models.config import TransformerConfig

_LATENT = ("self_attn.kv_a_proj_with_mqa.", "self_attn.kv_b_proj.", "self_attn.q_a_proj.")


def layer_targets(config: TransformerConfig, names: Collection[str], prefix: str) -> list[Target]:
    """`prefix`: what stands before the names of a layer's parts, with "{layer}" in it where there may be
    several."""
    spelt = {
        role: name.replace("layers.{layer}.", prefix) for role, name in folder_names(config, root="").items()
    }
    found = targets(config, names, Spelling(stored=spelt, modules={}))
    return [target for target in found if target.name.startswith("layers.")]


def refuse_others(parts: CheckpointParts, prefix: str, known: Iterable[Target], more: Iterable[str]) -> None:
    """A weight or bias behind `prefix` that is not among these would be part of another arithmetic. Raises
    CheckpointError."""
    used = {piece.stored for target in known for piece in target.pieces} | set(more)
    for name in sorted(parts.names):
        if not name.startswith(prefix) or name in used or not name.endswith(("weight", "bias")):
            continue
        if name.removeprefix(prefix).startswith(_LATENT):
            raise CheckpointError(
                f"{parts.folder}: '{name}' is of latent attention, which no head here has: draft without it"
            )
        raise CheckpointError(
            f"{parts.folder}: tensor '{name}' has no place in a head's layer of this shape: the head is of "
            f"another kind, draft without it"
        )


def take_layers(config: TransformerConfig, weights: dict[str, torch.Tensor], ops: Operations) -> Layers:
    """Removes them from `weights`."""
    taken = [take_layer(weights, config, index) for index in range(config.num_layers)]
    return Layers(config, taken, ops, taken[0].qkv.device)


def stored(role: str, name: str, *shape: int) -> Target:
    """A tensor as it is stored."""
    return Target(role, shape, (Piece(name, shape),))
