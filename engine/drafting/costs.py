"""What drafts add to a step, learned from the steps that are computed anyway.

    measured = scale * predicted without drafts
             + first_s if there are any drafts + block_s * blocks of rows added + draft_s * drafts

The four are fitted together, for each load by itself, as the prediction may be too low at one and too high at
another: by least squares of the relative errors with forgetting, those of drafts drawn towards a first
estimate. Steps that all have drafts do not tell them apart, so now and then one should have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scheduler.speculation import StepEconomy

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from scheduler.costs import CostModel
    from scheduler.plan import StepPlan

FORGETTING = 0.98  # of all earlier steps, with each step
PRIOR_STEPS = np.array([0.05, 1.0, 4.0, 16.0])  # that weigh as much as the first estimate of each of the four
OUTLIER = 3.0  # times what was expected: somebody else had the machine
LEAST_SHARE = 0.1  # of the prediction is always expected: who expects nothing takes every time for an outlier
FIRST_DRAFT_SHARE = 0.5  # first estimate: a draft in padding, of what a sequence takes: it has logits too
FEWEST_PLAIN = 2.0  # steps without drafts, forgotten like all others: with `FORGETTING`, one of 25


class DraftCosts:
    def __init__(self, costs: CostModel, row_block: int) -> None:
        self.costs = costs
        self.row_block = row_block
        self._fits: dict[int, _Fit] = {}  # by load

    def economy(self, slices: SequenceOf[tuple[int, int]], num_committed: int) -> StepEconomy:
        """Of a step with these slices, each (start, tokens), before any drafts."""
        fit = self._fit(len(slices))
        return StepEconomy(
            step_s=fit.scale * self.costs.step(slices),
            first_s=fit.first_s,
            num_committed=num_committed,
            num_rows=sum(count for _, count in slices),
            row_block=self.row_block,
            block_s=fit.block_s,
            draft_s=fit.draft_s,
        )

    def lacks_plain(self, slices: SequenceOf[tuple[int, int]]) -> bool:
        """Whether this step should have no drafts, so that it shows what one without them takes."""
        return self._fit(len(slices)).num_plain < FEWEST_PLAIN and all(count == 1 for _, count in slices)

    def note(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long. Those that compute prompts are not looked at: they drown what drafts add."""
        if any(len(piece.tokens) - piece.num_window != 1 for piece in plan.slices):
            return
        predicted_s = self.costs.step((piece.start, 1) for piece in plan.slices)
        if predicted_s > 0:  # a machine file may say 0
            rows, drafts = len(plan.slices), sum(piece.num_window for piece in plan.slices)
            blocks = -(-(rows + drafts) // self.row_block) - -(-rows // self.row_block)
            self._fit(rows).note(predicted_s, blocks, drafts, seconds)

    def _fit(self, num_slices: int) -> _Fit:
        load = num_slices.bit_length()
        if load not in self._fits:
            block_s, draft_s = self.costs.token_s * self.row_block, self.costs.slice_s * FIRST_DRAFT_SHARE
            self._fits[load] = _Fit(0.0, block_s, draft_s)
        return self._fits[load]


class _Fit:
    """`num_plain`: steps without drafts that it knows of."""

    def __init__(self, first_s: float, block_s: float, draft_s: float) -> None:
        self.num_plain = 0.0
        self._estimate = np.array([1.0, first_s, block_s, draft_s])
        self._found = self._estimate.copy()
        self._squares = np.zeros((4, 4))  # of what a step is made of, over the square of what was predicted
        self._products = np.zeros(4)  # the same times what it took

    @property
    def scale(self) -> float:
        return float(self._found[0])

    @property
    def first_s(self) -> float:
        return float(self._found[1])

    @property
    def block_s(self) -> float:
        return float(self._found[2])

    @property
    def draft_s(self) -> float:
        return float(self._found[3])

    def note(self, predicted_s: float, num_blocks: int, num_drafts: int, seconds: float) -> None:
        parts = np.array([predicted_s, num_drafts > 0, num_blocks, num_drafts])
        # What takes too long counts a little, or a machine that became slow would never be known.
        expected_s = max(float(parts @ self._found), LEAST_SHARE * predicted_s)
        seconds = min(seconds, OUTLIER * expected_s)
        self._squares = FORGETTING * self._squares + np.outer(parts, parts) / predicted_s**2
        self._products = FORGETTING * self._products + parts * (seconds / predicted_s**2)
        self.num_plain = FORGETTING * self.num_plain + (not num_drafts)
        self._found = self._solve(predicted_s)

    def _solve(self, predicted_s: float) -> NDArray[np.float64]:
        """None of the four may be negative: what would be is 0, and the others take its part."""
        seconds = np.array([False, True, True, True])
        weights = PRIOR_STEPS / np.where(seconds, predicted_s**2, 1.0)
        squares = self._squares + np.diag(weights)
        products = self._products + weights * self._estimate * np.where(seconds, self.scale, 1.0)
        free = np.arange(4)
        while True:
            found = np.linalg.solve(squares[np.ix_(free, free)], products[free])
            if found.min() >= 0:
                break
            free = np.delete(free, found.argmin())
        result = np.zeros(4)
        result[free] = found
        return result
