"""PARD (An 2025): a draft model that was taught to guess several tokens ahead in one pass.

Behind the last token stand copies of one mask token, at the positions that follow and causal like any text;
the row of the k-th says what comes k places further on. The masks' KV is forgotten. What they say does not
depend on each other's tokens, so every choice for a place may follow every choice for the place before it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from engine.drafting.candidate_tree import CandidateTrees, Level
from engine.drafting.guess import CATCHING_UP, NO_GUESS
from engine.drafting.models.draft_model import load_draft_model
from engine.models.fields import Fields
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as SequenceOf

    from engine.checkpoint import Checkpoint
    from engine.drafting.guess import Guess, Seen, Want
    from engine.drafting.models.draft_model import DraftModel
    from engine.drafting.models.following import Following, Stretch
    from engine.drafting.surroundings import Surroundings
    from scheduler.types import Sequence

MAX_MASKS = 11  # published models were taught to guess 8 to 16 tokens


def find(checkpoint: Checkpoint, config_json: Mapping[str, Any]) -> Callable[[Surroundings, int], Pard]:
    """Its configuration only -> what loads it. PARD-2's models too, which may look at the target's hidden
    states and draft without. Raises CheckpointError for what is none."""
    mask_token = Fields(f"{checkpoint.path}: config.json", config_json).count("pard_token", least=0)
    known = checkpoint.transformer.vocab_size
    if mask_token >= known:
        raise CheckpointError(
            f"{checkpoint.path}: config.json pard_token = {mask_token}, but the model knows {known} tokens"
        )
    return partial(_load, checkpoint, mask_token)


def _load(checkpoint: Checkpoint, mask_token: int, around: Surroundings, free_bytes: int) -> Pard:
    """Raises CheckpointError for what does not fit."""
    return Pard(*load_draft_model(checkpoint, around, free_bytes), mask_token)


class Pard:
    taps: tuple[int, ...] = ()

    def __init__(self, draft: DraftModel, following: Following, mask_token: int) -> None:
        self.draft = draft
        self.following = following
        self.mask_token = mask_token
        self.trees = CandidateTrees()

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
        guesses = dict.fromkeys(self.following.behind, CATCHING_UP)
        guesses |= {
            stretch.seq_id: self.trees.grow(stretch.want.sequence, found, stretch.limit, spreads=True)
            for stretch, found in zip(ready, levels, strict=True)
        }
        return [guesses.get(want.sequence.seq_id, NO_GUESS) for want in wants]

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """Committed tokens say all."""

    def release(self, sequence: Sequence) -> None:
        self.following.release(sequence.seq_id)
        self.trees.release(sequence.seq_id)

    def _masks(self, stretch: Stretch) -> tuple[int, ...]:
        return (self.mask_token,) * min(stretch.limit - 1, MAX_MASKS)

    def _levels(self, ready: list[Stretch], logits: torch.Tensor) -> list[list[Level]]:
        """logits [R, V]: of each sequence the rows of its places, in order. Where the request wants something
        of its logits, which may depend on what stands before, a place is judged as if the best of the places
        before it stood; else only their number matters."""
        counts = [1 + len(self._masks(stretch)) for stretch in ready]
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        wishes = [self.draft.processor_of(stretch.want.sequence) is not None for stretch in ready]
        together = [(index, depth) for index, count in enumerate(counts) for depth in range(count)]
        batches = [[place for place in together if not wishes[place[0]]]]
        for depth in range(max(counts, default=0)):
            batches.append([place for place in together if wishes[place[0]] and place[1] == depth])
        levels: list[list[Level]] = [[] for _ in ready]
        for batch in filter(None, batches):
            rows = logits[[firsts[index] + depth for index, depth in batch]]
            after = [(ready[index].want.sequence, self._line(levels[index], depth)) for index, depth in batch]
            for (index, _), found in zip(batch, self.draft.successors(rows, after), strict=True):
                levels[index].append(Level(found.tokens, found.chances))
        return levels

    def _line(self, levels: list[Level], depth: int) -> tuple[int, ...]:
        """The best of each place before this one, as far as they are known."""
        known = [level.tokens[0] for level in levels[:depth]]
        return (*known, *(self.mask_token,) * (depth - len(known)))
