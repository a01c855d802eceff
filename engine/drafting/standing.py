"""How often drafts have stood, by what their drafter thought of them: what it thinks then means something.

A drafter's chance is only how clearly a token leads in its own eyes. A small model is too sure of itself; and
where draws are coupled, a token that leads by little may stand nearly always. How far to draft is decided by
what came of it before.
"""

from __future__ import annotations

from engine.drafting.kinds import NUM_KINDS, belief_of, kind_of

PRIOR = 4.0  # drafts that a belief counts as much as
MEMORY = 400.0  # drafts that count; of earlier ones less and less does


class Standing:
    """Drafts that are drawn with noise are counted apart: their chances are of another kind."""

    def __init__(self) -> None:
        self._stood = [0.0] * (2 * NUM_KINDS)
        self._seen = [0.0] * (2 * NUM_KINDS)

    def chance(self, chance: float, rank: int, *, drawn: bool) -> float:
        """That a draft stands which is its parent's `rank`-th child and leads by `chance`, if its parent
        does; 0 stays 0."""
        if not chance:
            return 0.0
        kind = _index(chance, rank, drawn)
        return (PRIOR * belief_of(chance) + self._stood[kind]) / (PRIOR + self._seen[kind])

    def note(self, chance: float, rank: int, *, drawn: bool, stood: bool) -> None:
        kind = _index(chance, rank, drawn)
        keep = 1.0 - 1.0 / MEMORY
        self._seen[kind] = self._seen[kind] * keep + 1.0
        self._stood[kind] = self._stood[kind] * keep + stood


def _index(chance: float, rank: int, drawn: bool) -> int:
    return kind_of(chance, rank) + NUM_KINDS * drawn
