"""Guesses from the sequence's own prompt and output: copying, editing and code repeat themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafting.ngrams import NgramIndex

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Guess
    from scheduler.types import Sequence


class PromptLookup:
    def __init__(self) -> None:
        self._indices: dict[int, NgramIndex] = {}

    def guess(self, sequence: Sequence, limit: int) -> Guess:
        index = self._indices.get(sequence.seq_id)
        if index is None:
            index = self._indices[sequence.seq_id] = NgramIndex()
        index.extend(sequence.tokens[len(index.tokens) :])
        return index.guess(index.tokens, limit)

    def observe(self, sequence: Sequence, computed: SequenceOf[int], drawn: SequenceOf[int]) -> None:
        """Committed tokens say all."""

    def release(self, sequence: Sequence) -> None:
        self._indices.pop(sequence.seq_id, None)
