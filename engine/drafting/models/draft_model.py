"""A whole transformer that drafts: pieces of sequences in, what may follow them out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from engine.drafting.draft_kv import DraftKV
from engine.drafting.models.following import Following
from engine.models.context import for_context
from engine.models.transformer import Transformer
from engine.sampling.candidates import candidates
from engine.sampling.places import Place
from engine.weights.loader import check_weights, load_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from engine.checkpoint import Checkpoint
    from engine.drafting.draft_kv import DraftPiece
    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig
    from engine.sampling.processors import LogitsProcessor
    from scheduler.types import Sequence

SUCCESSORS = 3  # of a token, as drafts
LEAST_COST = 0.02  # of a pass: however small the model, its batches are prepared


class Successors(NamedTuple):
    """Tokens that may follow, best first; a chance of 0: may not."""

    tokens: list[int]
    chances: list[float]


class DraftModel:
    """`vocab_size`: of the target; tokens beyond the model's own never follow."""

    def __init__(
        self,
        model: Transformer,
        kv: DraftKV,
        vocab_size: int,
        processor_of: Callable[[Sequence], LogitsProcessor | None],
    ) -> None:
        self.model = model
        self.kv = kv
        self.vocab_size = vocab_size
        self.processor_of = processor_of

    def logits(self, pieces: list[DraftPiece]) -> torch.Tensor:
        """float32 [R, vocab_size] of the rows that the pieces want, in their order."""
        rows = self.kv.rows(pieces)
        hidden, _ = self.model.compute(rows, self.kv.storage)
        if not len(rows.wanted):
            return torch.empty(0, self.vocab_size, device=hidden.device)
        logits = self.model.logits(hidden, rows.wanted)
        missing = self.vocab_size - logits.shape[1]
        return F.pad(logits, (0, missing), value=float("-inf")) if missing else logits

    def successors(
        self, logits: torch.Tensor, after: SequenceOf[tuple[Sequence, tuple[int, ...]]]
    ) -> list[Successors]:
        """logits float32 [R, vocab_size], of rows each of which stands behind these drafts of a sequence."""
        if not after:
            return []
        places = [Place(sequence, path, self.processor_of(sequence)) for sequence, path in after]
        best = candidates(logits, places, SUCCESSORS)
        found = [Successors(*row) for row in zip(best.tokens.tolist(), best.chances.tolist(), strict=True)]
        if not all(row.chances[0] for row in found):
            self.kv.storage.tainted = True  # perhaps numbers went wrong: fresh pages are cleared from now on
        return found


def load_draft_model(
    checkpoint: Checkpoint, around: Surroundings, free_bytes: int
) -> tuple[DraftModel, Following]:
    """A model of any family and format that can be served, for sequences as long as it can have them. Raises
    CheckpointError, before anything is allocated, where its weights and one sequence do not fit."""
    max_len = min(around.max_model_len, checkpoint.transformer.max_positions)
    config = for_context(checkpoint.transformer, max_len)
    checkpoint = replace(checkpoint, transformer=config)
    _, num_bytes = check_weights(checkpoint, around.dtype, around.device, free_bytes)
    kv = DraftKV.beside(around, config, free_bytes - num_bytes)
    left = free_bytes - kv.storage.pages.nbytes
    model = Transformer(config, load_weights(checkpoint, around.dtype, around.device, left), around.ops)
    draft = DraftModel(model, kv, around.model.config.vocab_size, around.processor_of)
    return draft, Following(kv, max_len, config.vocab_size)


def pass_cost(config: TransformerConfig, target: TransformerConfig) -> float:
    """What a pass of a draft model takes of the time that one of the target takes, by the weights that each
    reads."""
    return max(LEAST_COST, _weights_read(config) / _weights_read(target))


def _weights_read(config: TransformerConfig) -> int:
    experts = config.experts
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * heads * config.head_dim
    dense = 3 * config.hidden_size * config.intermediate_size
    chosen = 3 * config.hidden_size * experts.intermediate_size * experts.per_token if experts else 0
    layers = sum(attention + (chosen if layer.experts else dense) for layer in config.layers)
    return layers + config.vocab_size * config.hidden_size
