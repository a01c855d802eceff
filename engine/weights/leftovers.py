"""What a checkpoint stores although its configuration does not ask for it, and the other way round.

Files say better than flags what a model was trained with. A head beside tied embeddings, biases that a flag
denies: where they would change the answer, they are used. What has no place in the model but lies in its
decoder would change the answer as well: that is refused. The rest is named in the log, but for what is known
to be of no use here. So nothing is dropped without a word.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.models.gguf_rotary import FACTOR_TENSORS
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from engine.models.config import TransformerConfig
    from engine.weights.layout import Piece, Target
    from engine.weights.source import WeightSource

    Layout = Callable[[TransformerConfig, Collection[str]], Iterable[Target]]

# Tables that are computed from the configuration, masks, towers that see or hear, heads that only draft.
_OF_NO_USE = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn_rot_embd\.weight|masked_bias|position_ids)$"
    r"|\.(self_attn|attn|attention)\.bias$"
    r"|^(model\.)?(vision|visual|audio|image|multi_modal|mm_)[a-z_]*\."
    r"|^(v|a|mm)\."
    r"|(^|\.)(mtp|nextn|medusa)[a-z_]*\."
)
_HEADS = ("lm_head.", "language_model.lm_head.")
_EMBEDDING = "embed_tokens.weight"  # in folders, behind what all names of the decoder begin with
_LAYER = re.compile(r".*?\b(layers|blk)\.(\d+)\.")
_DRAFTS = "eh_proj"  # the mark of a layer behind the last one, which predicts the token after the next
_SHOWN = 3


def as_stored(
    config: TransformerConfig, source: WeightSource, layout: Layout
) -> tuple[TransformerConfig, list[str]]:
    """The configuration as the stored tensors have it, and a line for each thing that it had otherwise.
    Raises CheckpointError for what cannot be read."""
    config, notes = _with_head(config, source, layout)
    if not any(name.endswith("bias") for name in source.names):
        return config, notes
    known = {target.name for target in layout(config, source.names)}
    for flag in ("qkv_bias", "out_bias", "mlp_bias"):
        change: dict[str, Any] = {flag: True}
        more = [one for one in layout(replace(config, **change), source.names) if one.name not in known]
        pieces = [piece for target in more for piece in target.pieces]
        if pieces and _are_stored(pieces, source) and not _are_zero(pieces, source):
            config = replace(config, **change)
            known.update(target.name for target in more)
            notes.append(f"the configuration denies '{pieces[0].stored}' and its like: they are used")
    return config, notes


def _with_head(
    config: TransformerConfig, source: WeightSource, layout: Layout
) -> tuple[TransformerConfig, list[str]]:
    untied = {target.name: target for target in layout(replace(config, tie_embeddings=False), source.names)}
    (head,), (embedding,) = untied["head"].pieces, untied["embedding"].pieces
    if head.stored not in source.names:
        if config.tie_embeddings:
            return config, []
        note = f"no tensor '{head.stored}': the embeddings serve as the head"
        return replace(config, tie_embeddings=True), [note]
    if not config.tie_embeddings or embedding.stored not in source.names:
        return config, []
    if source.equal(head.stored, embedding.stored):
        return config, []
    note = f"the configuration ties the head to the embeddings, but '{head.stored}' differs: it is used"
    return replace(config, tie_embeddings=False), [note]


def _are_stored(pieces: Sequence[Piece], source: WeightSource) -> bool:
    return all(piece.stored in source.names for piece in pieces)


def _are_zero(pieces: Sequence[Piece], source: WeightSource) -> bool:
    return all(source.is_zero(piece.stored) for piece in pieces)


def left_unread(config: TransformerConfig, source: WeightSource, targets: Sequence[Target]) -> list[str]:
    """A line that names what is stored and not among the targets' pieces; none where it is of no use.

    Raises CheckpointError where a tensor that nobody reads would change the answer.
    """
    used = {piece.stored for target in targets for piece in target.pieces}
    parts = {part.name for name in used for part in source.recipe(name).parts}
    drafting = {_layer_of(name) for name in source.names if f".{_DRAFTS}." in name}
    (embedding,) = next(target.pieces for target in targets if target.name == "embedding")
    root = embedding.stored.removesuffix(_EMBEDDING) if embedding.stored.endswith(_EMBEDDING) else ""
    others = []
    for name in source.names:
        if (
            name in used
            or name in parts
            or _layer_of(name) in drafting
            or _is_of_no_use(name, config, source)
        ):
            continue
        if not name.startswith((root, *_HEADS)):  # in GGUF files all names are the decoder's
            others.append(name)
        elif not (name.endswith("bias") and source.is_zero(name)):
            raise _unusable(name, config)
    if not others:
        return []
    shown = ", ".join(f"'{name}'" for name in sorted(others)[:_SHOWN])
    return [f"not read, as they lie beside the model: {shown}, {len(others)} tensors in all"]


def _is_of_no_use(name: str, config: TransformerConfig, source: WeightSource) -> bool:
    if _OF_NO_USE.search(name) or name in FACTOR_TENSORS:
        return True
    if source.quantised and not name.endswith(("weight", "bias")):  # tells how it was quantised
        return True
    return config.tie_embeddings and name.startswith(_HEADS) and name.endswith("weight")  # embeddings again


def _unusable(name: str, config: TransformerConfig) -> CheckpointError:
    layer = _LAYER.match(name)
    if layer and int(layer[2]) >= config.num_layers:
        return CheckpointError(
            f"tensor '{name}' is of a layer beyond the {config.num_layers} of the configuration: correct "
            f"their number, or take out what is not to be used"
        )
    return CheckpointError(
        f"tensor '{name}' would change the answer, and a {config.architecture} has no place for it"
    )


def _layer_of(name: str) -> str:
    """What all names of its layer begin with; the whole name where there is no layer."""
    found = _LAYER.match(name)
    return found[0] if found else name
