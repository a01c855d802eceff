"""Skip-join multi-level feedback queue with fixed quanta (after FastServe, arXiv:2305.05920).

Mended are two flaws of the published queue: a sequence is charged the cost of its own slices, not the wall
time of every batch it rode in; and levels are head starts instead of strict precedence, so that waiting
is bounded at every level and not only where a timer happens to look.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.costs import CostModel
    from scheduler.policies.base import Work


class StaticFeedbackQueue:
    """The work of a sequence is the service it has attained and the predicted cost of its prefill. Level
    k covers work up to `quantum_s * 2**k`; a sequence joins where its prefill puts it and only sinks. The
    head start falls evenly from `max_head_start_s` at level 0 to none at the lowest level."""

    preemptive = True
    gamma = 0.0
    epoch = 0.0
    lengths = None

    def __init__(
        self,
        quantum_s: float,
        num_levels: int,
        max_head_start_s: float,
        costs: CostModel,
        chunk: int,
        places: int,
    ) -> None:
        self.max_head_start_s = max_head_start_s if num_levels > 1 else 0.0
        self._num_levels = num_levels
        self._quantum_s = quantum_s
        self._costs, self._chunk, self._places = costs, chunk, places
        self._step_s = self.max_head_start_s / max(1, num_levels - 1)  # between neighbouring levels

    def enter(self, work: Work) -> None:
        pass

    def leave(self, work: Work) -> None:
        pass

    def level(self, work: Work) -> int:
        left = work.num_left
        work_s = work.attained_s
        if left:
            start = work.prompt_len + work.num_output - left
            work_s += self._costs.prefill(start, left, self._chunk, self._places)
        sunk = math.ceil(math.log2(work_s / self._quantum_s)) if work_s > self._quantum_s else 0
        return max(work.level, min(sunk, self._num_levels - 1))

    def next_change(self, work: Work) -> float:
        if work.level >= self._num_levels - 1:
            return math.inf
        per_token_s = self._costs.decode(work.prompt_len + work.num_output, self._places)
        if not per_token_s:
            return math.inf
        left_s = self._quantum_s * 2.0**work.level - work.attained_s
        return work.num_output + max(1, math.floor(left_s / per_token_s))

    def key(self, level: int, arrival_s: float) -> float:
        return arrival_s - self._step_s * (self._num_levels - 1 - level)

    def learn(self, work: Work, natural: bool) -> None:
        pass
