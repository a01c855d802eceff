"""How often drafts have stood, by what their drafter thought of them: what it thinks then means something.

A drafter's chance is only how clearly a token leads in its own eyes. A small model is too sure of itself; and
where draws are coupled, a token that leads by little may stand nearly always. How far to draft is decided by
what came of it before.
"""

from __future__ import annotations

PRIOR = 4.0  # drafts that a belief counts as much as


class Standing:
    """Of drafts by kind. `memory`: so many of a kind count; of earlier ones less and less does."""

    def __init__(self, memory: float = 400.0) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._seen: dict[int, float] = {}
        self._stood: dict[int, float] = {}

    def chance(self, kind: int, belief: float) -> float:
        """That a draft stands if the one that it follows does."""
        return (PRIOR * belief + self._stood.get(kind, 0.0)) / (PRIOR + self._seen.get(kind, 0.0))

    def note(self, kind: int, stood: bool) -> None:
        self._seen[kind] = self._seen.get(kind, 0.0) * self._keep + 1.0
        self._stood[kind] = self._stood.get(kind, 0.0) * self._keep + stood
