"""The tensors of an EAGLE-3 head, with its own vocabulary, which may be a part of the target's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from engine.drafting.heads.head_layers import layer_targets, refuse_others, stored, take_layers
from engine.drafting.heads.heads import Eagle3Head
from engine.models.transformer import NORMED
from engine.weights.errors import CheckpointError
from engine.weights.safetensors import read_folder, read_integers

if TYPE_CHECKING:
    from engine.drafting.heads.checkpoint_parts import CheckpointParts
    from engine.drafting.heads.eagle_config import EagleConfig
    from engine.drafting.surroundings import Surroundings
    from engine.weights.layout import Target

FEATURE_NORM = "hidden_norm.weight"  # of the first layer, which no other kind of head has


def read_eagle3(
    parts: CheckpointParts, config: EagleConfig, taps: tuple[int, ...], layer: str, around: Surroundings
) -> Eagle3Head:
    """Embeddings and vocabulary are the target's where there are no others. Raises CheckpointError."""
    model, hidden = around.model, config.layers.hidden_size
    top = next((top for top in ("", "model.") if f"{top}norm.weight" in parts.names), "")
    known = _known_tokens(parts, config.layers.vocab_size)
    columns = len(taps) * model.config.hidden_size
    first = layer.format(layer=0)
    norm = f"{first}input_layernorm.weight"
    layers = [
        _widened(target, 2 * hidden)
        for target in layer_targets(config.layers, parts.names, layer)
        if target.name != "layers.0.attention_norm"
    ]
    others = [
        stored("embedding_norm", norm, hidden),
        stored("feature_norm", first + FEATURE_NORM, hidden),
        stored("out_norm", f"{top}norm.weight", hidden),
    ]
    if taps:
        others.append(stored("fuse", f"{top}fc.weight", hidden, columns))
    seen_norms = _seen_norms(parts, config, len(taps), top, model.config.hidden_size)
    own = [
        stored(role, name, rows, hidden)
        for role, name, rows in (
            ("embedding", f"{top}embed_tokens.weight", model.config.vocab_size),
            ("head", "lm_head.weight", len(known) if known else model.config.vocab_size),
        )
        if name in parts.names or hidden != model.config.hidden_size
    ]
    refuse_others(parts, layer.partition("{")[0], layers, (norm, first + FEATURE_NORM))
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
        return [stored(f"seen_norm.{tap}", each.format(tap=tap), hidden) for tap in range(count)]
    if config.norm_before_fuse or one in parts.names:
        return [stored("seen_norm", one, count * hidden)]
    return []


def _widened(target: Target, columns: int) -> Target:
    """The first layer's attention reads two vectors."""
    if target.name != "layers.0.qkv.weight":
        return target
    pieces = tuple(replace(piece, shape=(piece.shape[0], columns)) for piece in target.pieces)
    return replace(target, shape=(target.shape[0], columns), pieces=pieces)


def _known_tokens(parts: CheckpointParts, vocab_size: int) -> tuple[int, ...] | None:
    """The tokens of a reduced vocabulary: d2t[k] is how far token k of the head is from the target's."""
    found = next(
        (tensor for name, tensor in read_folder(parts.folder).items() if name in ("d2t", "model.d2t")), None
    )
    if found is None:
        return None
    count = found.shape[0] if len(found.shape) == 1 else 0
    if found.dtype not in ("I32", "I64") or not 0 < count <= vocab_size:
        raise CheckpointError(
            f"{parts.folder}: tensor '{found.name}' is {found.dtype} {list(found.shape)}, but at most "
            f"{vocab_size} integers are needed"
        )
    tokens = tuple(token + shift for token, shift in enumerate(read_integers(found)))
    if len(set(tokens)) != len(tokens) or not all(0 <= token < vocab_size for token in tokens):
        raise CheckpointError(
            f"{parts.folder}: tensor '{found.name}' leads to a token twice, or outside the vocabulary of "
            f"{vocab_size}"
        )
    return tokens
