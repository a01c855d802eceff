"""Lookahead decoding (Fu 2024) on a line: the target's own answers to wrong drafts are the next drafts.

Drafts that were rejected were still computed, and what the target said after them is a Jacobi iteration of
the places to come: it is often right a few places further on, and its n-grams recur. So the sequence keeps
both the latest trajectory and a pool of its n-grams by their first token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.drafting.guess import NO_GUESS, Guess

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from scheduler.types import Sequence

WIDTH = 7  # places of the trajectory: with the last token they fill a block of 8 rows
NGRAM = 5
POOL, TRAJECTORY = 0, 1  # evidence


@dataclass(slots=True)
class _State:
    trajectory: tuple[int, ...]
    pool: dict[int, tuple[int, ...]] = field(default_factory=dict)  # first token -> what followed it last


class Lookahead:
    def __init__(self) -> None:
        self._states: dict[int, _State] = {}

    def guess(self, sequence: Sequence, limit: int) -> Guess:
        state = self._states.get(sequence.seq_id)
        if state is None:  # any guess will do to begin with; the latest tokens often recur
            state = self._states[sequence.seq_id] = _State(tuple(sequence.tokens[-WIDTH:]))
        pooled = state.pool.get(sequence.tokens[-1])
        if pooled:
            return Guess(pooled[:limit], POOL)
        return Guess(state.trajectory[:limit], TRAJECTORY) if state.trajectory else NO_GUESS

    def observe(self, sequence: Sequence, computed: SequenceOf[int], drawn: SequenceOf[int]) -> None:
        """`computed[0]` is the last committed token, the others drafts; `drawn` is what followed each."""
        state = self._states.get(sequence.seq_id)
        if state is None:
            return
        agreed = 0
        while agreed + 1 < len(computed) and computed[agreed + 1] == drawn[agreed]:
            agreed += 1
        ahead = tuple(drawn[agreed + 1 :])
        for start in range(len(drawn) - 1):
            state.pool[drawn[start]] = tuple(drawn[start + 1 : start + NGRAM])
        fresh = ahead or state.trajectory[1:]
        state.trajectory = (*fresh, *sequence.tokens[-WIDTH:])[:WIDTH]

    def release(self, sequence: Sequence) -> None:
        self._states.pop(sequence.seq_id, None)
