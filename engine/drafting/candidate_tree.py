"""Draft trees of candidates that were found place by place, best first by the chance of the whole path.

The shape is chosen for each guess (OPT-Tree, Wang 2024): where one candidate leads clearly the tree is a
line, where none does it is wide, and it ends where nothing is likely any more. What a drafter thinks of its
candidates is corrected by what became of such ones before, the nearer and the further ones apart.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from engine.drafting.guess import ROOT, Guess
from engine.drafting.kinds import NUM_KINDS, belief_of, kind_of
from engine.drafting.standing import Standing
from engine.sampling.places import Place
from engine.sampling.ranking import is_random

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from scheduler.types import Sequence

LEAST_CHANCE = 0.01  # of a whole path: what is less likely is not drafted
MEMORY = 200.0  # drafts of a kind that count
_DEPTHS = (1, 2, 4, 8)  # from here on drafts are further away


class Level(NamedTuple):
    """What may stand at one place, best first. A chance of 0: cannot stand there."""

    tokens: SequenceOf[int]
    chances: SequenceOf[float]


class _Branch(NamedTuple):
    """A draft that may be next in the tree; the heap's order is that of its fields."""

    cost: float  # minus the chance of the whole path
    depth: int
    parent: int
    rank: int
    on_trunk: bool  # all drafts before it are the best of their places


def best_first(
    levels: SequenceOf[Level],
    limit: int,
    *,
    spreads: bool = True,
    drawn: bool = False,
    standing: Standing | None = None,
) -> Guess:
    """At most `limit` drafts. `spreads`: whatever stands before it, a place has the same candidates; else
    they were found for the best ones before it, and the others have no drafts behind them. `drawn`: with
    noise."""
    known = Standing() if standing is None else standing
    tokens: list[int] = []
    parents: list[int] = []
    kinds: list[int] = []
    beliefs: list[float] = []
    heap: list[_Branch] = []

    def push_children(parent: int, depth: int, above: float, on_trunk: bool) -> None:
        for rank, chance in enumerate(levels[depth].chances if depth < len(levels) else ()):
            path = above * known.chance(_kind(chance, rank, depth, drawn=drawn), belief_of(chance))
            if chance and path >= LEAST_CHANCE:
                heapq.heappush(heap, _Branch(-path, depth, parent, rank, on_trunk))

    push_children(ROOT, 0, 1.0, True)
    while heap and len(tokens) < limit:
        cost, depth, parent, rank, on_trunk = heapq.heappop(heap)
        chance = levels[depth].chances[rank]
        tokens.append(levels[depth].tokens[rank])
        parents.append(parent)
        kinds.append(_kind(chance, rank, depth, drawn=drawn))
        beliefs.append(belief_of(chance))
        stays = on_trunk and rank == 0
        if stays or spreads:
            push_children(len(tokens) - 1, depth + 1, -cost, stays)
    return Guess(tuple(tokens), tuple(parents), tuple(kinds), tuple(beliefs))


class CandidateTrees:
    """The last tree of each sequence, and what became of all before."""

    def __init__(self) -> None:
        self.standing = Standing(MEMORY)
        self._last: dict[int, tuple[int, Guess]] = {}  # behind so many tokens

    def hope(self, sequence: Sequence, level: Level, depth: int) -> float:
        """The chance of the candidate that is likeliest to stand at this place, if those before it do."""
        drawn = is_random(Place(sequence))
        return max(
            self.standing.chance(_kind(chance, rank, depth, drawn=drawn), belief_of(chance))
            if chance
            else 0.0
            for rank, chance in enumerate(level.chances)
        )

    def grow(self, sequence: Sequence, levels: SequenceOf[Level], limit: int, *, spreads: bool) -> Guess:
        """The best drafts behind the sequence's last token; see `best_first`."""
        self._learn(sequence)
        drawn = is_random(Place(sequence))
        guess = best_first(levels, limit, spreads=spreads, drawn=drawn, standing=self.standing)
        self._last[sequence.seq_id] = len(sequence.tokens), guess
        return guess

    def release(self, seq_id: int) -> None:
        self._last.pop(seq_id, None)

    def _learn(self, sequence: Sequence) -> None:
        """The text itself says which of the last tree's drafts were right, verified or not."""
        length, guess = self._last.pop(sequence.seq_id, (0, None))
        if guess is None:
            return
        at = ROOT
        for token in sequence.tokens[length:]:
            children = [draft for draft, parent in enumerate(guess.parents) if parent == at]
            at = ROOT
            for draft in children:
                stood = guess.tokens[draft] == token
                self.standing.note(guess.kinds[draft], stood)
                at = draft if stood else at
            if at == ROOT:
                return


def _kind(chance: float, rank: int, depth: int, *, drawn: bool) -> int:
    """Where tokens are drawn with noise, a chance says something else: a draw that is known well leads by
    little."""
    distance = bisect_right(_DEPTHS, depth) + (len(_DEPTHS) + 1) * drawn
    return kind_of(chance, rank) + NUM_KINDS * distance
