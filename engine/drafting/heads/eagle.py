"""EAGLE's and EAGLE-3's checkpoints (EAGLE-2 is EAGLE with another tree), as their projects publish them.

SafeAILab/EAGLE, SpecForge, ModelOpt and vllm-project/speculators write one thing in several spellings: which
of the two it is, and biases and norms, follow from the tensors that are there. Fields that change the
arithmetic are read where each project writes them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from engine.drafting.draft_kv import DraftKV
from engine.drafting.heads.checkpoint_parts import CheckpointParts
from engine.drafting.heads.eagle3_weights import FEATURE_NORM, read_eagle3
from engine.drafting.heads.eagle_config import read_config, read_taps
from engine.drafting.heads.eagle_weights import FUSES, read_eagle
from engine.drafting.heads.head_drafter import HeadDrafter
from engine.drafting.models.draft_model import pass_cost
from engine.models.context import for_context
from engine.weights.errors import CheckpointError
from engine.weights.safetensors import read_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from engine.drafting.heads.eagle_config import EagleConfig
    from engine.drafting.heads.heads import Eagle3Head, FusingHead
    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig

_LAYERS = ("layers.{layer}.", "model.layers.{layer}.", "midlayer.", "model.midlayer.", "transformer.")


def is_eagle(folder: Path) -> bool:
    """Whether the tensors are those of such a head: its configuration often says no more than "Llama"."""
    names = read_folder(folder).keys()
    layer = _layer(names)
    fused = any(f"{fuse}.weight" in names for fuse in FUSES)
    return bool(layer) and (fused or layer.format(layer=0) + FEATURE_NORM in names)


def find(
    folder: Path, config_json: Mapping[str, Any], target: TransformerConfig
) -> Callable[[Surroundings, int], HeadDrafter]:
    """Headers only -> what loads the head. Raises CheckpointError for one of another model, or of a form that
    is not known."""
    parts = CheckpointParts(folder)
    layer = _layer(parts.names) or _LAYERS[0]
    first = layer.format(layer=0)
    config = read_config(folder, config_json, target, parts.names, first)
    if config.layers.num_layers > 1 and first == layer:
        raise CheckpointError(
            f"{folder}: config.json speaks of {config.layers.num_layers} layers, but '{layer}' is only one"
        )
    is_third = first + FEATURE_NORM in parts.names
    taps = read_taps(folder, config_json, target.num_layers) if is_third else ()
    if not taps and config.layers.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{folder}: a head of size {config.layers.hidden_size} cannot read hidden states of size "
            f"{target.hidden_size} as they are: take one that was trained for this model"
        )
    return partial(_load, parts, config, taps if is_third else None, layer)


def _load(
    parts: CheckpointParts,
    config: EagleConfig,
    taps: tuple[int, ...] | None,
    layer: str,
    around: Surroundings,
    free_bytes: int,
) -> HeadDrafter:
    """`taps`: None where it is no EAGLE-3. Raises CheckpointError for tensors that do not fit."""
    # Beyond what it was trained for, its guesses are merely worse.
    reach = max(config.layers.max_positions, around.max_model_len)
    layers = for_context(replace(config.layers, max_positions=reach), around.max_model_len)
    config = replace(config, layers=layers)
    target = around.model.config
    head: Eagle3Head | FusingHead
    num_known = target.vocab_size
    if taps is None:
        head = read_eagle(parts, config, layer, around)
    else:
        head = read_eagle3(parts, config, taps, layer, around)
        num_known = len(head.head)
    cost = pass_cost(replace(layers, vocab_size=num_known), target)
    return HeadDrafter(head, DraftKV.beside(around, layers, free_bytes), around, cost)


def _layer(names: Collection[str]) -> str:
    """What stands before the names of a layer's parts; "": there is none."""
    return next(
        (layer for layer in _LAYERS if f"{layer.format(layer=0)}self_attn.q_proj.weight" in names), ""
    )
