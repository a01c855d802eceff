"""Medusa heads (Cai 2024): small heads on what the target's own head sees, each for one place further on.

Head k looks at the row after which the last token was drawn, and guesses the token k + 2 places behind that
row: k + 1 places behind the last token. It does not know which tokens stand between.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from engine.drafting.candidate_tree import LEAST_CHANCE, CandidateTrees, Level
from engine.drafting.guess import NO_GUESS
from engine.drafting.heads.medusa_weights import read_form, read_weights
from engine.models.transformer import NORMED
from engine.sampling.candidates import candidates
from engine.sampling.places import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as SequenceOf
    from pathlib import Path

    from engine.drafting.guess import Guess, Seen, Want
    from engine.drafting.heads.medusa_weights import MedusaForm, MedusaWeights
    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig
    from scheduler.types import Sequence

WIDTH = 8  # candidates for a place


def find(
    folder: Path, config_json: Mapping[str, Any], target: TransformerConfig
) -> Callable[[Surroundings, int], Medusa]:
    """Headers only -> what loads the heads. Raises CheckpointError for those of another model or of an
    unknown form."""
    return partial(_load, read_form(folder, config_json, target))


def _load(form: MedusaForm, around: Surroundings, free_bytes: int) -> Medusa:
    """Raises CheckpointError for tensors that do not fit."""
    del free_bytes  # beside its weights it needs nothing
    return Medusa(read_weights(form, around), around)


class _State(NamedTuple):
    length: int  # tokens of the sequence for which `feature` is the latest
    feature: torch.Tensor  # [hidden]


class Medusa:
    taps: tuple[int, ...] = (NORMED,)

    def __init__(self, weights: MedusaWeights, around: Surroundings) -> None:
        self.weights = weights
        self.around = around
        self.trees = CandidateTrees()
        self._states: dict[int, _State] = {}

    def observe(self, seen: SequenceOf[Seen]) -> None:
        for one in seen:
            if not one.drawn:
                continue
            last = len(one.tokens) - len(one.drawn)  # the row of the last committed token
            row = last + 1 + one.kept[-1] if one.kept else last
            length = one.start + last + 1 + len(one.kept) + 1
            self._states[one.sequence.seq_id] = _State(length, one.features[0][row].clone())

    def release(self, sequence: Sequence) -> None:
        self._states.pop(sequence.seq_id, None)
        self.trees.release(sequence.seq_id)

    @torch.inference_mode()
    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        guesses = [NO_GUESS] * len(wants)
        able = [index for index, want in enumerate(wants) if want.limit > 0 and self._knows(want.sequence)]
        if not able:
            return guesses
        asked = [wants[index] for index in able]
        for index, want, levels in zip(able, asked, self._levels(asked), strict=True):
            guesses[index] = self.trees.grow(want.sequence, levels, want.limit, spreads=True)
        return guesses

    def _knows(self, sequence: Sequence) -> bool:
        state = self._states.get(sequence.seq_id)
        return state is not None and state.length == len(sequence.tokens)

    def _levels(self, wants: list[Want]) -> list[list[Level]]:
        """Candidates for each place of each want, as far as there is hope; what a request asks of its logits
        (penalties, bad words) is asked as if the best candidates stood before."""
        features = torch.stack([self._states[want.sequence.seq_id].feature for want in wants])
        levels: list[list[Level]] = [[] for _ in wants]
        paths: list[tuple[int, ...]] = [() for _ in wants]
        hopes = [1.0] * len(wants)
        deepest = max(want.limit for want in wants)
        for head in range(min(self.weights.num_heads, deepest)):
            if max(hopes) < LEAST_CHANCE:
                break
            places = [
                Place(want.sequence, path, self.around.processor_of(want.sequence))
                for want, path in zip(wants, paths, strict=True)
            ]
            found = candidates(self.logits(features, head), places, WIDTH)
            tokens, chances = found.tokens.tolist(), found.chances.tolist()
            for row, level in enumerate(map(Level, tokens, chances)):
                levels[row].append(level)
                paths[row] = (*paths[row], level.tokens[0])
                hopes[row] *= self.trees.hope(wants[row].sequence, level, head)
        return levels

    def logits(self, features: torch.Tensor, head: int) -> torch.Tensor:
        """features [R, hidden], what the target's head saw -> float32 [R, vocab] of one head"""
        ops, weights = self.around.ops, self.weights
        hidden = features
        for block in weights.blocks[head]:
            hidden = hidden + F.silu(ops.linear(hidden, block.weight, block.bias))
        logits = ops.linear(hidden, weights.vocabularies[head], None).float() * weights.logit_scale
        if weights.token_map is None:
            return logits
        everywhere = logits.new_full((len(logits), self.around.model.config.vocab_size), float("-inf"))
        return everywhere.index_copy_(1, weights.token_map, logits)
