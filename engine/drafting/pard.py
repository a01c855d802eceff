"""PARD (An 2025): a draft model that was taught to guess several tokens ahead in one pass.

Behind the last token stand copies of one mask token, at the positions that follow and causal like any text;
the row of the k-th says what comes k places further on. The masks' KV is forgotten. What they say does not
depend on each other's tokens, so every choice for a place may follow every choice for the place before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from engine.drafting.candidate_tree import Level, best_first
from engine.drafting.draft_model import load_draft_model
from engine.drafting.guess import NO_GUESS
from engine.models.fields import Fields
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as SequenceOf

    from engine.checkpoint import Checkpoint
    from engine.drafting.draft_model import DraftModel
    from engine.drafting.following import Following, Stretch
    from engine.drafting.guess import Guess, Seen, Want
    from engine.drafting.surroundings import Surroundings
    from scheduler.types import Sequence

MAX_MASKS = 11  # published models were taught to guess 8 to 16 tokens


def load(
    checkpoint: Checkpoint, config_json: Mapping[str, Any], around: Surroundings, free_bytes: int
) -> Pard:
    """PARD-2's models too, which may look at the target's hidden states and draft without. Raises
    CheckpointError for what cannot be served or does not fit."""
    mask_token = Fields(f"{checkpoint.path}: config.json", config_json).count("pard_token", least=0)
    known = checkpoint.transformer.vocab_size
    if mask_token >= known:
        raise CheckpointError(
            f"{checkpoint.path}: config.json pard_token = {mask_token}, but the model knows {known} tokens"
        )
    draft, following = load_draft_model(checkpoint, around, free_bytes)
    return Pard(draft, following, mask_token)


class Pard:
    taps: tuple[int, ...] = ()

    def __init__(self, draft: DraftModel, following: Following, mask_token: int) -> None:
        self.draft = draft
        self.following = following
        self.mask_token = mask_token

    @torch.inference_mode()
    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        stretches = self.following.stretches(wants)
        if not stretches:
            return [NO_GUESS] * len(wants)
        pieces = [self.following.piece(stretch, self._masks(stretch)) for stretch in stretches]
        logits = self.draft.logits(pieces)
        for stretch in stretches:
            self.draft.kv.crop(stretch.seq_id, stretch.end)
        ready = [stretch for stretch in stretches if stretch.catches_up]
        levels = self._levels(ready, logits)
        guesses = {
            stretch.seq_id: best_first(found, stretch.limit)
            for stretch, found in zip(ready, levels, strict=True)
        }
        return [guesses.get(want.sequence.seq_id, NO_GUESS) for want in wants]

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """Committed tokens say all."""

    def release(self, sequence: Sequence) -> None:
        self.following.release(sequence.seq_id)

    def _masks(self, stretch: Stretch) -> tuple[int, ...]:
        return (self.mask_token,) * min(stretch.limit - 1, MAX_MASKS)

    def _levels(self, ready: list[Stretch], logits: torch.Tensor) -> list[list[Level]]:
        """logits [R, V]: of each sequence the rows of its places, in order. A place is judged as if the best
        of the places before it stood."""
        counts = [1 + len(self._masks(stretch)) for stretch in ready]
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        levels: list[list[Level]] = [[] for _ in ready]
        paths: list[tuple[int, ...]] = [()] * len(ready)
        for depth in range(max(counts, default=0)):
            there = [index for index, count in enumerate(counts) if count > depth]
            after = [(ready[index].want.sequence, paths[index]) for index in there]
            best = self.draft.successors(logits[[firsts[index] + depth for index in there]], after)
            for index, found in zip(there, best, strict=True):
                levels[index].append(Level(found.tokens, found.chances))
                paths[index] = (*paths[index], found.tokens[0])
        return levels
