"""EAGLE's and EAGLE-3's checkpoints (EAGLE-2 is EAGLE with another tree), as their projects publish them.

SafeAILab/EAGLE, SpecForge, ModelOpt and vllm-project/speculators write one thing in several spellings: which
of the two it is, and biases and norms, follow from the tensors that are there. Fields that change the
arithmetic are read where each project writes them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from engine.drafting.checkpoint_parts import CheckpointParts
from engine.drafting.draft_kv import DraftKV
from engine.drafting.eagle_config import read_config, read_taps
from engine.drafting.head_drafter import HeadDrafter
from engine.drafting.head_layers import layer_targets, pass_share, refuse_others, take_layers
from engine.drafting.heads import Eagle3Head, FusingHead
from engine.models.transformer import NORMED
from engine.weights.errors import CheckpointError
from engine.weights.layout import Piece, Target
from engine.weights.safetensors import read_folder, read_integers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine.drafting.eagle_config import EagleConfig
    from engine.drafting.surroundings import Surroundings

_LAYERS = ("layers.{layer}.", "model.layers.{layer}.", "midlayer.", "model.midlayer.", "transformer.")
_FUSES = ("fc", "model.fc", "fusion_fc")
_EMBEDDING_NORMS = ("embedding_layernorm.weight", "model.embedding_layernorm.weight")
_FEATURE_NORMS = ("hidden_states_layernorm.weight", "model.hidden_states_layernorm.weight")


def is_eagle(folder: Path) -> bool:
    """Whether the tensors are those of such a head: its configuration often says no more than "Llama"."""
    names = read_folder(folder).keys()
    layer = next((prefix for prefix in _LAYERS if _query(prefix) in names), "")
    return bool(layer) and (
        _feature_norm(layer) in names or any(f"{fuse}.weight" in names for fuse in _FUSES)
    )


def load(folder: Path, config_json: Mapping[str, Any], around: Surroundings, free_bytes: int) -> HeadDrafter:
    """Raises CheckpointError for heads of another model, or of a form that is not known."""
    parts = CheckpointParts(folder)
    layer = next((prefix for prefix in _LAYERS if _query(prefix) in parts.names), _LAYERS[0])
    target = around.model.config
    first = layer.format(layer=0)
    config = read_config(folder, config_json, target, around.max_model_len, parts.names, first)
    if config.layers.num_layers > 1 and first == layer:
        raise CheckpointError(
            f"{folder}: config.json speaks of {config.layers.num_layers} layers, but '{layer}' is only one"
        )
    head: Eagle3Head | FusingHead
    if _feature_norm(layer) in parts.names:
        taps = read_taps(folder, config_json, target.num_layers)
        head = _eagle3(parts, config, taps, layer, around)
    else:
        head = _eagle(parts, config, layer, around)
    head_rows = len(head.head) if isinstance(head, Eagle3Head) else target.vocab_size
    kv = DraftKV.beside(around, config.layers, free_bytes)
    return HeadDrafter(head, kv, around, pass_share(config.layers, head_rows, target))


def _query(layer: str) -> str:
    return f"{layer.format(layer=0)}self_attn.q_proj.weight"


def _feature_norm(layer: str) -> str:
    return f"{layer.format(layer=0)}hidden_norm.weight"


def _eagle(parts: CheckpointParts, config: EagleConfig, layer: str, around: Surroundings) -> FusingHead:
    """The first layer has no norm before its attention. Embeddings and vocabulary are the target's."""
    hidden = around.model.config.hidden_size
    layers = [
        target
        for target in layer_targets(config.layers, parts.names, layer)
        if target.name != "layers.0.attention_norm"
    ]
    norm = f"{layer.format(layer=0)}input_layernorm.weight"  # where it is stored, nobody uses it
    refuse_others(parts, layer.partition("{")[0], layers, (norm,))
    fuse = next((name for name in _FUSES if f"{name}.weight" in parts.names), _FUSES[0])
    others = [_tensor("fuse", f"{fuse}.weight", hidden, 2 * hidden)]
    if f"{fuse}.bias" in parts.names:
        others.append(_tensor("fuse_bias", f"{fuse}.bias", hidden))
    for role, spellings in (("embedding_norm", _EMBEDDING_NORMS), ("feature_norm", _FEATURE_NORMS)):
        others += [_tensor(role, name, hidden) for name in spellings if name in parts.names]
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


def _eagle3(
    parts: CheckpointParts, config: EagleConfig, taps: tuple[int, ...], layer: str, around: Surroundings
) -> Eagle3Head:
    """Embeddings and vocabulary are the target's where there are no others."""
    model, hidden = around.model, config.layers.hidden_size
    top = next((top for top in ("", "model.") if f"{top}norm.weight" in parts.names), "")
    known = _known_tokens(parts, config.layers.vocab_size)
    columns = len(taps) * model.config.hidden_size
    norm = f"{layer.format(layer=0)}input_layernorm.weight"
    layers = [
        _widened(target, 2 * hidden)
        for target in layer_targets(config.layers, parts.names, layer)
        if target.name != "layers.0.attention_norm"
    ]
    others = [
        _tensor("embedding_norm", norm, hidden),
        _tensor("feature_norm", _feature_norm(layer), hidden),
        _tensor("out_norm", f"{top}norm.weight", hidden),
    ]
    if taps:
        others.append(_tensor("fuse", f"{top}fc.weight", hidden, columns))
    seen_norms = _seen_norms(parts, config, len(taps), top, model.config.hidden_size)
    own = [
        _tensor(role, name, rows, hidden)
        for role, name, rows in (
            ("embedding", f"{top}embed_tokens.weight", model.config.vocab_size),
            ("head", "lm_head.weight", len(known) if known else model.config.vocab_size),
        )
        if name in parts.names or hidden != model.config.hidden_size
    ]
    refuse_others(parts, layer.partition("{")[0], layers, (norm, _feature_norm(layer)))
    weights = parts.load([*layers, *others, *seen_norms, *own], around.dtype, around.device)
    embedding = weights.get("embedding", model.embedding)
    if torch.equal(embedding, model.embedding):
        embedding = model.embedding  # the same numbers need no second place
    tokens = torch.tensor(known, dtype=torch.int64, device=around.device) if known else None
    head = weights.get("head")
    if head is None:
        head = model.head if tokens is None else model.head.index_select(0, tokens)
    return Eagle3Head(
        layers=take_layers(config.layers, weights, around.ops),
        taps=taps or (NORMED,),
        embedding=embedding,
        fuse=weights.get("fuse"),
        embedding_norm=weights["embedding_norm"],
        feature_norm=weights["feature_norm"],
        out_norm=weights["out_norm"],
        head=head,
        known=tokens,
        seen_norms=tuple(weights[norm.name] for norm in seen_norms),
        residual_is_normed=config.residual_is_normed,
        passes_normed=config.passes_normed,
    )


def _seen_norms(
    parts: CheckpointParts, config: EagleConfig, count: int, top: str, hidden: int
) -> list[Target]:
    """EAGLE 3.1's: one of each tap, or one of all side by side."""
    each, one = f"{top}fc_norm.{{tap}}.weight", f"{top}input_norm.weight"
    if config.norm_each_tap or each.format(tap=0) in parts.names:
        return [_tensor(f"seen_norm.{tap}", each.format(tap=tap), hidden) for tap in range(count)]
    if config.norm_before_fuse or one in parts.names:
        return [_tensor("seen_norm", one, count * hidden)]
    return []


def _tensor(role: str, stored: str, *shape: int) -> Target:
    return Target(role, shape, (Piece(stored, shape),))


def _widened(target: Target, columns: int) -> Target:
    """The first layer's attention reads two vectors."""
    if target.name != "layers.0.qkv.weight":
        return target
    pieces = tuple(replace(piece, shape=(piece.shape[0], columns)) for piece in target.pieces)
    return replace(target, shape=(target.shape[0], columns), pieces=pieces)


def _known_tokens(parts: CheckpointParts, vocab_size: int) -> tuple[int, ...] | None:
    """The tokens of a reduced vocabulary: d2t[k] is how far token k of the head is from the target's."""
    stored = next(
        (tensor for name, tensor in read_folder(parts.folder).items() if name in ("d2t", "model.d2t")), None
    )
    if stored is None:
        return None
    count = stored.shape[0] if len(stored.shape) == 1 else 0
    if stored.dtype not in ("I32", "I64") or not 0 < count <= vocab_size:
        raise CheckpointError(
            f"{parts.folder}: tensor '{stored.name}' is {stored.dtype} {list(stored.shape)}, but at most "
            f"{vocab_size} integers are needed"
        )
    tokens = tuple(token + shift for token, shift in enumerate(read_integers(stored)))
    if len(set(tokens)) != len(tokens) or not all(0 <= token < vocab_size for token in tokens):
        raise CheckpointError(
            f"{parts.folder}: tensor '{stored.name}' leads to a token twice, or outside the vocabulary of "
            f"{vocab_size}"
        )
    return tokens
