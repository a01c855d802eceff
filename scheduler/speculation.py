"""How much to speculate: drafts are computed where they are expected to pay, over all sequences of a step.

A step commits one token for each sequence that decodes, and one more for each draft that is accepted. A draft
is worth its cost while it raises the expected tokens per second of the whole step (goodput: Liu 2024,
"TurboSpec"; which drafts: the likeliest first, over all sequences: Xiong 2024, "DySpec"). Where many
sequences decode, a token more costs what it is worth at best, and nobody speculates: by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

LEAST_GAIN = 1.1  # of the step's expected tokens per second, over those without drafts


class Candidate(NamedTuple):
    """Drafts for one sequence: `chances[k]` that draft k stands, and so everything that it follows. A draft
    comes after the one that it follows and has no greater chance."""

    seq_id: int
    chances: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEconomy:
    """A step as it would be without drafts, and what drafts would add."""

    step_s: float
    num_committed: int  # tokens that it commits
    num_rows: int  # tokens that it computes
    row_block: int  # rows are computed in blocks of so many
    first_s: float = 0.0  # for the first draft
    block_s: float  # for one more block of rows
    draft_s: float  # for each draft, sampled and verified

    def added_s(self, num_drafts: int) -> float:
        blocks = -(-(self.num_rows + num_drafts) // self.row_block) - -(-self.num_rows // self.row_block)
        return (self.first_s if num_drafts else 0.0) + self.block_s * blocks + self.draft_s * num_drafts

    def price(self, num_drafts: int) -> float:
        """Of each of so many drafts: tokens that would be committed in the same time without them."""
        if not num_drafts or not self.step_s:
            return 0.0
        return self.added_s(num_drafts) / num_drafts * self.num_committed / self.step_s


def grant(
    candidates: SequenceOf[Candidate], economy: StepEconomy, max_drafts: int
) -> dict[int, tuple[int, ...]]:
    """Which drafts to compute, by sequence, in their order; sequences that get none are left out. With a
    draft comes everything that it follows.

    The likeliest first; of all beginnings of that order the one with the most expected tokens per second.
    None where that is hardly more than without: estimates err, and drafts that only seem to pay cost time.
    """
    ordered = sorted(_entries(candidates), reverse=True)[: max(0, max_drafts)]
    expected: float = economy.num_committed
    best, best_rate = 0, expected / economy.step_s
    for number, (chance, _, _) in enumerate(ordered, 1):
        expected += chance
        rate = expected / (economy.step_s + economy.added_s(number))
        if rate > best_rate:
            best, best_rate = number, rate
    if best_rate * economy.step_s < LEAST_GAIN * economy.num_committed:
        return {}
    granted: dict[int, list[int]] = {}
    for _, before, seq_id in ordered[:best]:
        granted.setdefault(seq_id, []).append(-before)
    return {seq_id: tuple(sorted(drafts)) for seq_id, drafts in granted.items()}


def may_pay(economy: StepEconomy, max_drafts: int) -> bool:
    """Whether drafts would pay if all of them stood: else nobody needs to guess. They are cheapest, each,
    where a block ends: at the first end or, the more the more so or the less so, at the last."""
    first = -economy.num_rows % economy.row_block
    last = max_drafts - (max_drafts - first) % economy.row_block
    return any(
        count * economy.step_s > economy.num_committed * economy.added_s(count)
        for count in (min(first, max_drafts), last, max_drafts)
        if count > 0
    )


def _entries(candidates: Iterable[Candidate]) -> list[tuple[float, int, int]]:
    """(chance, - number, sequence) of every draft: the earlier of two equal ones sorts before the later."""
    return [
        (chance, -number, candidate.seq_id)
        for candidate in candidates
        for number, chance in enumerate(candidate.chances)
    ]
