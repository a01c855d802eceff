"""Guesses from the sequence's own prompt and output: copying, editing and code repeat themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafting.guess import CATCHING_UP, NO_GUESS
from engine.drafting.ngrams import NgramIndex

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Guess, Seen, Want
    from scheduler.types import Sequence


MAX_INDEXED_AT_ONCE = 2048  # tokens of all sequences, at some 6 us each: prompts stop nobody's step


class PromptLookup:
    """Of all sequences at most about `max_tokens` are indexed, of `TOKEN_BYTES` each: who comes later gets no
    guesses until there is room."""

    taps: tuple[int, ...] = ()

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0  # of sequences that are indexed, or are to be
        self._indices: dict[int, NgramIndex] = {}
        self._lengths: dict[int, int] = {}  # what each of them counts for

    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        for want in wants:
            self._admit(want.sequence)
        self._index([want.sequence for want in wants if want.sequence.seq_id in self._indices])
        return [self._guess(want) for want in wants]

    def _admit(self, sequence: Sequence) -> None:
        length = len(sequence.tokens)
        if sequence.seq_id not in self._indices:
            if self.num_tokens and self.num_tokens + length > self.max_tokens:
                return
            self._indices[sequence.seq_id] = NgramIndex()
        self.num_tokens += length - self._lengths.get(sequence.seq_id, 0)
        self._lengths[sequence.seq_id] = length

    def _index(self, sequences: list[Sequence]) -> None:
        """Who lacks least goes first: nobody waits for another's long prompt."""
        left = MAX_INDEXED_AT_ONCE
        lacking = [(len(one.tokens) - len(self._indices[one.seq_id].tokens), one) for one in sequences]
        for _, one in sorted(lacking, key=lambda entry: entry[0]):
            index = self._indices[one.seq_id]
            begin = len(index.tokens)
            index.extend(one.tokens[begin : begin + left])
            left -= len(index.tokens) - begin

    def _guess(self, want: Want) -> Guess:
        index = self._indices.get(want.sequence.seq_id)
        if index is None:
            return NO_GUESS
        if len(index.tokens) < len(want.sequence.tokens):
            return CATCHING_UP
        return index.guess(index.tokens, want.limit)

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """Committed tokens say all."""

    def release(self, sequence: Sequence) -> None:
        self._indices.pop(sequence.seq_id, None)
        self.num_tokens -= self._lengths.pop(sequence.seq_id, 0)
