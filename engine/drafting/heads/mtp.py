"""Multi-token prediction heads inside the target's own checkpoint (DeepSeek-V3, 2024, section 2.2).

Published under three spellings of one thing: DeepSeek's and GLM's, MiMo's, and Qwen3-Next's. Embeddings and
vocabulary are the target's. Where there are several heads in a row, the first is used for every place, as it
is where there is one. A head whose layer is not of the shape that the model's own have is refused.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from engine.checkpoint import CheckpointKind
from engine.drafting.draft_kv import DraftKV
from engine.drafting.heads.checkpoint_parts import CheckpointParts
from engine.drafting.heads.head_drafter import HeadDrafter
from engine.drafting.heads.head_layers import layer_targets, refuse_others, take_layers
from engine.drafting.heads.heads import FusingHead
from engine.drafting.models.draft_model import pass_cost
from engine.models.fields import Fields
from engine.models.transformer import NORMED
from engine.models.weights import take_norm
from engine.weights.errors import CheckpointError
from engine.weights.layout import Piece, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from engine.checkpoint import Checkpoint
    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig


class _Spelling(NamedTuple):
    """Names behind `base`, but for the parts of its decoder layer, which are behind `layer`; in both "{own}"
    stands for how many layers the model has."""

    base: str
    layer: str
    fuse: str
    embedding_norm: str
    feature_norm: str
    out_norm: str
    feature_first: bool = False  # in the columns of `fuse`
    shared: tuple[str, ...] = ()  # the target's own, stored once more


_MIMO = ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm")
_SPELLINGS = (
    _Spelling(
        "model.layers.{own}.", "model.layers.{own}.", "eh_proj", "enorm", "hnorm", "shared_head.norm",
        shared=("shared_head.head", "embed_tokens"),
    ),
    _Spelling("model.mtp_layers.0.", "model.mtp_layers.0.", *_MIMO, feature_first=True),
    _Spelling("mtp.", "mtp.layers.0.", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"),
    _Spelling("mtp_layers.0.", "mtp_layers.0.", *_MIMO),  # vllm-project/speculators
)  # fmt: skip


def find_own(
    checkpoint: Checkpoint | None, target: TransformerConfig
) -> Callable[[Surroundings, int], HeadDrafter]:
    """Headers only -> what loads the head in the target's own checkpoint. Raises CheckpointError where there
    is none that fits."""
    if checkpoint is None or checkpoint.kind is not CheckpointKind.FOLDER:
        where = "the model" if checkpoint is None else str(checkpoint.path)
        raise CheckpointError(
            f"{where}: multi-token prediction heads are read from folders of safetensors files, and this is "
            f"none: draft without 'mtp'"
        )
    return _find(checkpoint.path, target, own=True)


def find(
    folder: Path, config_json: Mapping[str, Any], target: TransformerConfig
) -> Callable[[Surroundings, int], HeadDrafter]:
    """The same in a folder of its own (vllm-project/speculators), of the shape of the target's own layers.
    Raises CheckpointError."""
    fields = Fields(f"{folder}: config.json", config_json).within("transformer_layer_config")
    for name, own in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if fields.has(name) and fields.count(name) != own:
            raise CheckpointError(
                f"{folder}: the head has {name} = {fields.count(name)}, the model has {own}: take one that "
                f"was trained for this model"
            )
    return _find(folder, target)


def _find(
    folder: Path, target: TransformerConfig, *, own: bool = False
) -> Callable[[Surroundings, int], HeadDrafter]:
    """`own`: it is one part of many in the folder, of which nobody has counted the bytes."""
    parts = CheckpointParts(folder)
    spelling = _spelling(parts, target.num_layers)
    config = _layer_config(target, parts.names, spelling)
    layers = layer_targets(config, parts.names, spelling.layer)
    others = _others(config, spelling)
    stored = [piece.stored for one in others for piece in one.pieces]
    refuse_others(parts, spelling.layer, layers, (*stored, *spelling.shared))
    return partial(_load, parts, config, [*layers, *others], own)


def _load(
    parts: CheckpointParts,
    config: TransformerConfig,
    targets: list[Target],
    own: bool,
    around: Surroundings,
    free_bytes: int,
) -> HeadDrafter:
    if own:
        free_bytes -= _bytes(parts.folder, targets, around.dtype, free_bytes)
    weights = parts.load(targets, around.dtype, around.device)
    head = FusingHead(
        layers=take_layers(config, weights, around.ops),
        target=around.model,
        taps=(NORMED,),
        fuse=weights["fuse"],
        embedding_norm=take_norm(weights, "embedding_norm", config),
        feature_norm=take_norm(weights, "feature_norm", config),
        out_norm=take_norm(weights, "out_norm", config),
    )
    kv = DraftKV.beside(around, config, free_bytes)
    return HeadDrafter(head, kv, around, pass_cost(config, around.model.config))


def _bytes(folder: Path, targets: list[Target], dtype: torch.dtype, free_bytes: int) -> int:
    """Raises CheckpointError where there is not so much."""
    num_bytes = sum(prod(target.shape) for target in targets) * dtype.itemsize
    if num_bytes > free_bytes:
        raise CheckpointError(
            f"{folder}: the multi-token prediction head takes {num_bytes} bytes, {max(free_bytes, 0)} are "
            f"free for it: lower kv_cache_bytes, or draft without 'mtp'"
        )
    return num_bytes


def _spelling(parts: CheckpointParts, num_layers: int) -> _Spelling:
    """Names in full, as they are stored."""
    for known in _SPELLINGS:
        base = known.base.format(own=num_layers)
        found = known._replace(
            base=base,
            layer=known.layer.format(own=num_layers),
            fuse=f"{base}{known.fuse}.weight",
            embedding_norm=f"{base}{known.embedding_norm}.weight",
            feature_norm=f"{base}{known.feature_norm}.weight",
            out_norm=f"{base}{known.out_norm}.weight",
            shared=tuple(f"{base}{name}.weight" for name in known.shared),
        )
        if found.fuse in parts.names:
            return found
    names = ", ".join(f"{known.base.format(own=num_layers)}{known.fuse}" for known in _SPELLINGS)
    raise CheckpointError(
        f"{parts.folder}: no multi-token prediction head is there (none of {names}): draft without 'mtp'"
    )


def _layer_config(
    target: TransformerConfig, names: Collection[str], spelling: _Spelling
) -> TransformerConfig:
    """One layer like the model's last, which sees everything; its experts only if they are stored."""
    experts = any(name.startswith(f"{spelling.layer}mlp.experts.") for name in names)
    if experts and target.experts is None:
        raise CheckpointError(
            f"'{spelling.layer}mlp.experts.' tensors are stored for the head of a model without experts: "
            f"draft without 'mtp'"
        )
    layer = replace(target.layers[-1], window=0, chunk=0, experts=experts)
    return replace(target, layers=(layer,))


def _others(config: TransformerConfig, spelling: _Spelling) -> list[Target]:
    hidden = config.hidden_size
    arrange = _feature_last if spelling.feature_first else None
    fuse = Piece(spelling.fuse, (hidden, 2 * hidden), arrange=arrange)
    norms = [
        Target(role, (hidden,), (Piece(getattr(spelling, role), (hidden,)),), exact=config.norm_offset)
        for role in ("embedding_norm", "feature_norm", "out_norm")
    ]
    return [Target("fuse", (hidden, 2 * hidden), (fuse,)), *norms]


def _feature_last(stored: torch.Tensor) -> torch.Tensor:
    """[hidden, feature and embedding] -> [hidden, embedding and feature]"""
    return torch.cat(stored.chunk(2, dim=1)[::-1], dim=1)
