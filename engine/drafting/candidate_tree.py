"""A draft tree from candidates that were found place by place, best first by the product of their chances.

The shape is chosen for each guess (OPT-Tree, Wang 2024): where one candidate leads clearly the tree is a
line, where none does it is wide, and it ends where nothing is likely any more.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

from engine.drafting.guess import ROOT, Guess
from engine.drafting.kinds import belief_of, kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

LEAST_CHANCE = 0.005  # of a whole path: what is less likely is not drafted


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


def best_first(levels: SequenceOf[Level], limit: int, *, spreads: bool = True) -> Guess:
    """At most `limit` drafts. `spreads`: whatever stands before it, a place has the same candidates; else
    they were found for the best ones before it, and the others have no drafts behind them."""
    tokens: list[int] = []
    parents: list[int] = []
    kinds: list[int] = []
    beliefs: list[float] = []
    heap: list[_Branch] = []

    def push(path: float, depth: int, parent: int, rank: int, on_trunk: bool) -> None:
        if depth == len(levels) or rank == len(levels[depth].tokens):
            return
        chance = path * levels[depth].chances[rank]
        if chance >= LEAST_CHANCE:
            heapq.heappush(heap, _Branch(-chance, depth, parent, rank, on_trunk))

    push(1.0, 0, ROOT, 0, True)
    while heap and len(tokens) < limit:
        cost, depth, parent, rank, on_trunk = heapq.heappop(heap)
        chance = levels[depth].chances[rank]
        tokens.append(levels[depth].tokens[rank])
        parents.append(parent)
        kinds.append(kind_of(chance, rank))
        beliefs.append(belief_of(chance))
        push(-cost / chance, depth, parent, rank + 1, on_trunk)
        stays = on_trunk and rank == 0
        if stays or spreads:
            push(-cost, depth + 1, len(tokens) - 1, 0, stays)
    return Guess(tuple(tokens), tuple(parents), tuple(kinds), tuple(beliefs))
