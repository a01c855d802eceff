"""What drafts add to a step, learned from the steps that are computed anyway.

    measured = scale * predicted without drafts + block_s * blocks of rows added + draft_s * drafts

The three are fitted together, by least squares of the relative errors with forgetting; where steps do not
tell them apart, the two of drafts are drawn towards a first estimate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scheduler.speculation import StepEconomy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.costs import CostModel
    from scheduler.plan import StepPlan

FORGETTING = 0.98  # of all earlier steps, with each step
PRIOR_STEPS = np.array([1.0, 8.0, 32.0])  # that weigh as much as the first estimate of each of the three
OUTLIER = 3.0  # times what was expected: somebody else had the machine
FIRST_DRAFT_SHARE = 0.25  # first estimate: a draft in padding costs this share of a token


class DraftCosts:
    def __init__(self, costs: CostModel, row_block: int) -> None:
        self.costs = costs
        self.row_block = row_block
        self._first = np.array([1.0, costs.token_s * row_block, costs.token_s * FIRST_DRAFT_SHARE])
        self._fitted = self._first.copy()
        self._squares = np.zeros((3, 3))  # of what a step is made of, over the square of what was predicted
        self._products = np.zeros(3)  # the same times what it took

    @property
    def scale(self) -> float:
        return float(self._fitted[0])

    @property
    def block_s(self) -> float:
        return float(self._fitted[1])

    @property
    def draft_s(self) -> float:
        return float(self._fitted[2])

    def economy(self, slices: Iterable[tuple[int, int]], num_committed: int) -> StepEconomy:
        """Of a step with these slices, each (start, tokens), before any drafts."""
        slices = list(slices)
        return StepEconomy(
            step_s=self.scale * self.costs.step(slices),
            num_committed=num_committed,
            num_rows=sum(count for _, count in slices),
            row_block=self.row_block,
            block_s=self.block_s,
            draft_s=self.draft_s,
        )

    def note(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long. Those that compute prompts are not looked at: they drown what drafts add."""
        if any(len(piece.tokens) - piece.num_window != 1 for piece in plan.slices):
            return
        predicted_s = self.costs.step((piece.start, 1) for piece in plan.slices)
        if predicted_s <= 0:  # a machine file may say so
            return
        rows, drafts = len(plan.slices), sum(piece.num_window for piece in plan.slices)
        blocks = -(-(rows + drafts) // self.row_block) - -(-rows // self.row_block)
        parts = np.array([predicted_s, blocks, drafts])
        # What takes too long counts a little, or a machine that became slow would never be known.
        seconds = min(seconds, OUTLIER * float(parts @ self._fitted))
        self._squares = FORGETTING * self._squares + np.outer(parts, parts) / predicted_s**2
        self._products = FORGETTING * self._products + parts * (seconds / predicted_s**2)
        self._fit(predicted_s)

    def _fit(self, predicted_s: float) -> None:
        """None of the three may be negative: what would be is 0, and the others take its part."""
        weights = PRIOR_STEPS / np.array([1.0, predicted_s**2, predicted_s**2])
        first = self._first * np.array([1.0, self.scale, self.scale])
        squares = self._squares + np.diag(weights)
        products = self._products + weights * first
        free = np.arange(3)
        while True:
            found = np.linalg.solve(squares[np.ix_(free, free)], products[free])
            if found.min() >= 0:
                break
            free = np.delete(free, found.argmin())
        self._fitted = np.zeros(3)
        self._fitted[free] = found
