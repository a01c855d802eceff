"""How long steps take against what the cost model predicts, which was fitted once, at start-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from scheduler.costs import CostModel
    from scheduler.plan import StepPlan

LOOK_EVERY: Final = 8  # steps; to predict one of 256 slices takes a tenth of a millisecond
NEWEST_SHARE: Final = 0.1  # in the mean


class StepTimes:
    """`ratio`: measured over predicted, an exponential mean over the steps looked at; 0 before the first."""

    def __init__(self, costs: CostModel) -> None:
        self.ratio = 0.0
        self._costs = costs

    def note(self, plan: StepPlan, seconds: float) -> None:
        if plan.step % LOOK_EVERY:  # nor at the first one, which loads kernels
            return
        predicted_s = self._costs.step((piece.start, len(piece.tokens)) for piece in plan.slices)
        if predicted_s > 0:
            newest = seconds / predicted_s
            self.ratio += (newest - self.ratio) * (NEWEST_SHARE if self.ratio else 1.0)
