"""Lookahead decoding (Fu 2024) on a line: the target's own answers to wrong drafts are the next drafts.

Drafts that were rejected were still computed, and what the target said after them is a Jacobi iteration of
the places to come: it is often right a few places further on, and its n-grams recur. So the sequence keeps
both the latest trajectory and a pool of its n-grams by their first token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.drafting.guess import ROOT, line

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Guess, Seen, Want
    from scheduler.types import Sequence

WIDTH = 7  # places of the trajectory: with the last token they fill a block of 8 rows
NGRAM = 5
POOL, TRAJECTORY = 0, 1  # where a draft comes from
BELIEF = 0.4
MAX_POOL = 512  # first tokens of a sequence's n-grams: some 0.1 MB


@dataclass(slots=True)
class _State:
    trajectory: tuple[int, ...]
    pool: dict[int, tuple[int, ...]] = field(default_factory=dict)  # first token -> what followed it last


class Lookahead:
    taps: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._states: dict[int, _State] = {}

    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        return [self._guess(want) for want in wants]

    def _guess(self, want: Want) -> Guess:
        sequence = want.sequence
        state = self._states.get(sequence.seq_id)
        if state is None:  # any guess will do to begin with; the latest tokens often recur
            state = self._states[sequence.seq_id] = _State(tuple(sequence.tokens[-WIDTH:]))
        pooled = state.pool.get(sequence.tokens[-1])
        tokens, source = (pooled, POOL) if pooled else (state.trajectory, TRAJECTORY)
        kinds = [2 * min(depth, 4) + source for depth in range(len(tokens))]
        return line(tokens[: want.limit], kinds[: want.limit], BELIEF)

    def observe(self, seen: SequenceOf[Seen]) -> None:
        for one in seen:
            state = self._states.get(one.sequence.seq_id)
            if state is not None and one.drawn:
                _learn(state, one)

    def release(self, sequence: Sequence) -> None:
        self._states.pop(sequence.seq_id, None)


def _learn(state: _State, seen: Seen) -> None:
    """What the target said along the drafts that go deepest, on from those that stood."""
    drafts = seen.tokens[len(seen.tokens) - len(seen.parents) :]
    path = _longest_path(seen)
    drawn = [seen.drawn[draft + 1] for draft in (ROOT, *path)]
    for start in range(len(drawn) - 1):
        state.pool[drawn[start]] = tuple(drawn[start + 1 : start + NGRAM])
        if len(state.pool) > MAX_POOL:
            del state.pool[next(iter(state.pool))]
    agreed = 0
    while agreed < len(path) and drafts[path[agreed]] == drawn[agreed]:
        agreed += 1
    fresh = tuple(drawn[agreed + 1 :]) or state.trajectory[1:]
    state.trajectory = (*fresh, *seen.sequence.tokens[-WIDTH:])[:WIDTH]


def _longest_path(seen: Seen) -> list[int]:
    """From the last draft that stood as deep as drafts go, and from the root to it."""
    path = list(seen.kept)
    at = path[-1] if path else ROOT
    for draft in range(at + 1, len(seen.parents)):
        if seen.parents[draft] == at:
            path.append(draft)
            at = draft
    return path
