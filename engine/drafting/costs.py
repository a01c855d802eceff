"""What drafts add to a step, learned from the steps that are computed anyway.

    measured = scale * predicted without drafts + block_s * blocks of rows added + draft_s * drafts

`scale` is the mean ratio over steps without drafts; the two others are fitted to what steps with drafts took
beyond that, by least squares with forgetting, drawn towards a first estimate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.step_times import LOOK_EVERY
from scheduler.speculation import StepEconomy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.costs import CostModel
    from scheduler.plan import StepPlan

FORGETTING = 0.98  # of all earlier steps, with each step
PRIOR_STEPS = 8.0  # steps that weigh as much as the first estimate
NEWEST_SHARE = 0.05  # in the mean ratio
OUTLIER = 3.0  # times what was predicted: somebody else had the machine
FIRST_DRAFT_SHARE = 0.25  # first estimate: a draft in padding costs this share of a token


class DraftCosts:
    def __init__(self, costs: CostModel, row_block: int) -> None:
        self.costs = costs
        self.row_block = row_block
        self.scale = 1.0
        self._num_plain = 0
        self._block_s = costs.token_s * row_block
        self._draft_s = costs.token_s * FIRST_DRAFT_SHARE
        self._moments = [0.0] * 5  # of blocks b, drafts d, excess e: sums of bb, bd, dd, be, de

    @property
    def block_s(self) -> float:
        return self._block_s

    @property
    def draft_s(self) -> float:
        return self._draft_s

    def economy(self, slices: Iterable[tuple[int, int]], num_committed: int) -> StepEconomy:
        """Of a step with these slices, each (start, tokens), before any drafts."""
        slices = list(slices)
        return StepEconomy(
            step_s=self.scale * self.costs.step(slices),
            num_committed=num_committed,
            num_rows=sum(count for _, count in slices),
            row_block=self.row_block,
            block_s=self._block_s,
            draft_s=self._draft_s,
        )

    def note(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long. Those that compute prompts are not looked at: they drown what drafts add."""
        drafts = sum(piece.num_window for piece in plan.slices)
        if not drafts and plan.step % LOOK_EVERY:
            return
        if any(len(piece.tokens) - piece.num_window != 1 for piece in plan.slices):
            return
        predicted_s = self.costs.step((piece.start, 1) for piece in plan.slices)
        if predicted_s <= 0:  # a machine file may say so
            return
        longest_s = OUTLIER * self.scale * predicted_s + drafts * self._block_s
        if not drafts:
            self._num_plain += 1
            seconds = min(seconds, longest_s)  # it counts, or a machine that became slow would never be known
            self.scale += max(NEWEST_SHARE, 1 / self._num_plain) * (seconds / predicted_s - self.scale)
            self._fit(0, 0, 0.0)
            return
        if seconds > longest_s:
            return
        rows = len(plan.slices)
        blocks = -(-(rows + drafts) // self.row_block) - -(-rows // self.row_block)
        self._fit(blocks, drafts, seconds - self.scale * predicted_s)

    def _fit(self, blocks: int, drafts: int, excess_s: float) -> None:
        new = (blocks * blocks, blocks * drafts, drafts * drafts, blocks * excess_s, drafts * excess_s)
        self._moments = [old * FORGETTING + one for old, one in zip(self._moments, new, strict=True)]
        bb, bd, dd, be, de = self._moments
        # Towards the first estimate, as if `PRIOR_STEPS` steps had measured just that.
        token_s = self.scale * self.costs.token_s
        bb, be = bb + PRIOR_STEPS, be + PRIOR_STEPS * token_s * self.row_block
        dd, de = dd + PRIOR_STEPS * 4, de + PRIOR_STEPS * 4 * token_s * FIRST_DRAFT_SHARE
        determinant = bb * dd - bd * bd
        self._block_s = max(0.0, (be * dd - de * bd) / determinant)
        self._draft_s = max(0.0, (bb * de - bd * be) / determinant)
