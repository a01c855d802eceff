"""Kinds of drafts whose drafter has a chance for each: how often they stand is learned for each kind."""

from __future__ import annotations

from bisect import bisect_right

# Denser where drafts are likely: there a little more chance decides over the length of a line.
_BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95)
NUM_CHANCES = len(_BOUNDS) + 1
NUM_RANKS = 3  # the likeliest child of its parent, the second, all others
NUM_KINDS = NUM_CHANCES * NUM_RANKS
SURE, HOPELESS = 0.98, 0.02


def kind_of(chance: float, rank: int) -> int:
    """Of a draft of this chance that is its parent's `rank`-th child, from 0; -> 0 .. NUM_KINDS - 1"""
    return min(rank, NUM_RANKS - 1) * NUM_CHANCES + bisect_right(_BOUNDS, chance)


def belief_of(chance: float) -> float:
    """What to think of such a draft before anything is learned: a drafter's chances are never certain."""
    return min(max(chance, HOPELESS), SURE)
