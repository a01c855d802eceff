"""Guesses from the sequence's own prompt and output: copying, editing and code repeat themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafting.guess import NO_GUESS
from engine.drafting.ngrams import NgramIndex

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Guess, Seen, Want
    from scheduler.types import Sequence


MAX_INDEXED_AT_ONCE = 2048  # tokens of a sequence, at some 6 us each: long prompts stop nobody's step


class PromptLookup:
    """Of all sequences at most about `max_tokens` are indexed, at some 0.8 KB each: who comes later gets no
    guesses until there is room."""

    taps: tuple[int, ...] = ()

    def __init__(self, max_tokens: int = 2**18) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._indices: dict[int, NgramIndex] = {}

    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        return [self._guess(want) for want in wants]

    def _guess(self, want: Want) -> Guess:
        sequence = want.sequence
        index = self._indices.get(sequence.seq_id)
        if index is None:
            if self.num_tokens and self.num_tokens + len(sequence.tokens) > self.max_tokens:
                return NO_GUESS
            index = self._indices[sequence.seq_id] = NgramIndex()
        begin = len(index.tokens)
        fresh = sequence.tokens[begin : begin + MAX_INDEXED_AT_ONCE]
        index.extend(fresh)
        self.num_tokens += len(fresh)
        if len(index.tokens) < len(sequence.tokens):
            return NO_GUESS
        return index.guess(index.tokens, want.limit)

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """Committed tokens say all."""

    def release(self, sequence: Sequence) -> None:
        index = self._indices.pop(sequence.seq_id, None)
        if index is not None:
            self.num_tokens -= len(index.tokens)
