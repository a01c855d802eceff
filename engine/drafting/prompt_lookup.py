"""Guesses from the sequence's own prompt and output: copying, editing and code repeat themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafting.guess import NO_GUESS
from engine.drafting.ngrams import NgramIndex

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Guess
    from scheduler.types import Sequence


class PromptLookup:
    """Of all sequences at most about `max_tokens` are indexed, at some 0.8 KB each: who comes later gets no
    guesses until there is room."""

    def __init__(self, max_tokens: int = 2**18) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._indices: dict[int, NgramIndex] = {}

    def guess(self, sequence: Sequence, limit: int) -> Guess:
        index = self._indices.get(sequence.seq_id)
        if index is None:
            if self.num_tokens and self.num_tokens + len(sequence.tokens) > self.max_tokens:
                return NO_GUESS
            index = self._indices[sequence.seq_id] = NgramIndex()
        fresh = sequence.tokens[len(index.tokens) :]
        index.extend(fresh)
        self.num_tokens += len(fresh)
        return index.guess(index.tokens, limit)

    def observe(self, sequence: Sequence, computed: SequenceOf[int], drawn: SequenceOf[int]) -> None:
        """Committed tokens say all."""

    def release(self, sequence: Sequence) -> None:
        index = self._indices.pop(sequence.seq_id, None)
        if index is not None:
            self.num_tokens -= len(index.tokens)
