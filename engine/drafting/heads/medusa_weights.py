"""Medusa heads as they are published: two spellings of one thing.

The authors' (FasterDecoding/Medusa): `0.0.linear.weight`, `0.0.linear.bias`, `0.1.weight`: head 0's first
block, then its vocabulary, which later ones leave to the target's head; alone or behind `medusa_head.`. And
that of vLLM: `blocks.0.layers.0.weight`, `lm_heads.0.weight`, possibly `token_map`, the tokens that the heads
know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from engine.drafting.heads.checkpoint_parts import CheckpointParts
from engine.models.fields import Fields
from engine.weights.errors import CheckpointError
from engine.weights.safetensors import read_folder, read_integers

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig
    from engine.weights.safetensors import Shape

MAX_HEADS = 64
MAX_BLOCKS = 64  # of a head
_PREFIXES = ("", "medusa_head.", "medusa_heads.")


class Block(NamedTuple):
    """x + SiLU(W x + b)"""

    weight: torch.Tensor  # [hidden, hidden]
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class MedusaWeights:
    """`token_map`: int64 [known], where the heads' vocabularies are a part of the target's."""

    blocks: tuple[tuple[Block, ...], ...]  # of each head
    vocabularies: tuple[torch.Tensor, ...]  # of each head, [vocab or known, hidden]
    token_map: torch.Tensor | None = None
    logit_scale: float = 1.0

    @property
    def num_heads(self) -> int:
        return len(self.blocks)


class _Names(NamedTuple):
    """What a checkpoint calls the parts of its heads."""

    block: str  # {head}, {block}; without ".weight" and ".bias"
    vocabulary: str  # {head}; may be absent


class MedusaForm(NamedTuple):
    """What the headers say: the tensors of each head's blocks without ".weight", and of its vocabulary ("" =
    the target's); the shapes of all that are stored; the tokens that the heads know, None = all."""

    parts: CheckpointParts
    blocks: list[list[str]]
    vocabularies: list[str]
    shapes: dict[str, Shape]
    tokens: tuple[int, ...] | None
    logit_scale: float


def read_form(folder: Path, config_json: Mapping[str, Any], target: TransformerConfig) -> MedusaForm:
    """Raises CheckpointError for heads of another model or of an unknown form."""
    fields = Fields(f"{folder}: config.json", config_json)
    for name, own in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if fields.has(name) and fields.count(name) != own:
            raise CheckpointError(
                f"{folder}: the Medusa heads have {name} = {fields.count(name)}, the model has {own}: take "
                f"heads that were trained for this model"
            )
    num_heads = _bounded(fields, "medusa_num_heads", "num_heads", None, MAX_HEADS)
    num_blocks = _bounded(fields, "medusa_num_layers", "num_hidden_layers", 1, MAX_BLOCKS)
    parts = CheckpointParts(folder)
    names = _spelling(parts.names, num_blocks)
    tokens = _token_map(folder, fields, target.vocab_size)
    vocabularies = _vocabularies(parts.names, names, num_heads, fields)
    blocks = [
        [names.block.format(head=head, block=block) for block in range(num_blocks)]
        for head in range(num_heads)
    ]
    hidden, rows = target.hidden_size, target.vocab_size
    matrices = {f"{name}.weight": (hidden, hidden) for line in blocks for name in line}
    biases = {f"{name}.bias": (hidden,) for line in blocks for name in line}
    shapes: dict[str, Shape] = matrices | {name: biases[name] for name in biases if name in parts.names}
    for name in filter(None, vocabularies):
        part = tokens is not None and parts.rows(name) != rows
        shapes[name] = (len(tokens) if part and tokens else rows, hidden)
    return MedusaForm(parts, blocks, vocabularies, shapes, tokens, fields.number("logit_scale", 1.0))


def read_weights(form: MedusaForm, around: Surroundings) -> MedusaWeights:
    """Raises CheckpointError for tensors that are missing or misshapen, before anything is read."""
    parts, tokens = form.parts, form.tokens
    wanted = (parts.whole(*entry) for entry in form.shapes.items())
    loaded = parts.load(wanted, around.dtype, around.device) | {"": around.model.head}
    token_map = None if tokens is None else torch.tensor(tokens, dtype=torch.int64, device=around.device)
    known = {name: _known(loaded[name], token_map) for name in set(form.vocabularies)}
    return MedusaWeights(
        tuple(
            tuple(Block(loaded[f"{name}.weight"], loaded.get(f"{name}.bias")) for name in line)
            for line in form.blocks
        ),
        tuple(known[name] for name in form.vocabularies),
        token_map,
        form.logit_scale,
    )


def _bounded(fields: Fields, name: str, other: str, default: int | None, most: int) -> int:
    found = name if fields.has(name) or not fields.has(other) else other
    count = fields.count(found, default)
    if count > most:
        raise fields.unsupported(found, count, f"; the limit is {most}")
    return count


def _spelling(names: Collection[str], num_blocks: int) -> _Names:
    for prefix in _PREFIXES:
        if f"{prefix}blocks.0.layers.0.weight" in names:
            return _Names(f"{prefix}blocks.{{head}}.layers.{{block}}", f"{prefix}lm_heads.{{head}}.weight")
        if f"{prefix}0.0.linear.weight" in names:
            break
    else:
        prefix = ""  # the names that are missing are those of the authors
    return _Names(f"{prefix}{{head}}.{{block}}.linear", f"{prefix}{{head}}.{num_blocks}.weight")


def _vocabularies(names: Collection[str], spelling: _Names, num_heads: int, fields: Fields) -> list[str]:
    """The stored tensor of each head's vocabulary; "" = the target's."""
    each = [spelling.vocabulary.format(head=head) for head in range(num_heads)]
    if fields.flag("original_lm_head"):
        return [next((name for name in ("lm_head.weight", each[0]) if name in names), "")] * num_heads
    return each if any(name in names for name in each) else [""] * num_heads


def _token_map(folder: Path, fields: Fields, vocab_size: int) -> tuple[int, ...] | None:
    """The tokens that the heads know, where that is not all."""
    count = fields.count("truncated_vocab_size", vocab_size)
    if count == vocab_size:
        return None
    stored = read_folder(folder).get("token_map")
    if stored is None:
        raise CheckpointError(f"{folder}: truncated_vocab_size = {count}, and tensor 'token_map' is missing")
    if stored.dtype not in ("I32", "I64") or stored.shape != (count,):
        raise CheckpointError(
            f"{folder}: tensor 'token_map' is {stored.dtype} {list(stored.shape)}, it needs {count} integers"
        )
    tokens = read_integers(stored)
    if len(set(tokens)) != count or not all(0 <= token < vocab_size for token in tokens):
        raise CheckpointError(
            f"{folder}: tensor 'token_map' names a token twice, or one outside the vocabulary of {vocab_size}"
        )
    return tokens


def _known(vocabulary: torch.Tensor, token_map: torch.Tensor | None) -> torch.Tensor:
    """[vocab or known, hidden] -> the rows of the tokens that are known"""
    if token_map is None or len(vocabulary) == len(token_map):
        return vocabulary
    return vocabulary.index_select(0, token_map)
