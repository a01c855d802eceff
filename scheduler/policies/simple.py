"""Orders of service without feedback, to compare with and for special uses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.clock import Clock
    from scheduler.costs import CostModel
    from scheduler.policies.base import Work

MAX_PRIORITY = 1000
_RATIO = 1.1  # of neighbouring classes of size


class _Simple:
    """One level that never changes, no preemption, nothing to learn."""

    preemptive = False
    max_head_start_s = math.inf
    gamma = 0.0
    epoch: float = 0.0
    lengths = None

    def enter(self, work: Work) -> None:
        pass

    def leave(self, work: Work) -> None:
        pass

    def level(self, work: Work) -> int:
        return 0

    def next_change(self, work: Work) -> float:
        return math.inf

    def learn(self, work: Work, natural: bool) -> None:
        pass


class FirstComeFirstServed(_Simple):
    max_head_start_s = 0.0

    def key(self, level: int, arrival_s: float) -> float:
        return arrival_s


class Priority(_Simple):
    """The request's `priority`, lower first, and within one by arrival. Preemptive; a low priority may
    starve, which is what it is for."""

    preemptive = True

    def level(self, work: Work) -> int:
        return max(-MAX_PRIORITY, min(work.priority, MAX_PRIORITY))

    def key(self, level: int, arrival_s: float) -> float:
        return level * 1e9 + arrival_s  # no server runs for 1e9 s


class HighestResponseRatioNext(_Simple):
    """The largest (time waited + prefill) / prefill first (Brinch Hansen, 1971). A level is a class of
    prefill cost. Not preemptive: the ratio is about getting a place."""

    def __init__(self, costs: CostModel, chunk: int, places: int, clock: Clock) -> None:
        self._costs, self._chunk, self._places, self._clock = costs, chunk, places, clock

    def level(self, work: Work) -> int:
        return _class_of(self._costs.prefill(0, max(1, work.prompt_len), self._chunk, self._places))

    @property
    def epoch(self) -> float:  # type: ignore[override]
        return self._clock()

    def key(self, level: int, arrival_s: float) -> float:
        return -(self._clock() - arrival_s) / _RATIO**level


class ShortestRemainingFirst(_Simple):
    """The least remaining service first, taking `max_output` for the true length: for comparison, and
    for work whose lengths are known."""

    preemptive = True

    def __init__(self, costs: CostModel, chunk: int, places: int) -> None:
        self._costs, self._chunk, self._places = costs, chunk, places

    def level(self, work: Work) -> int:
        left = work.num_left
        start = work.prompt_len + work.num_output - left
        left_s = self._costs.prefill(start, left, self._chunk, self._places)
        context = work.prompt_len + work.max_output // 2
        num_output = max(1, work.max_output - work.num_output)
        return _class_of(left_s + num_output * self._costs.decode(context, self._places))

    def next_change(self, work: Work) -> float:
        return work.num_output + max(1, (work.max_output - work.num_output) // 10)

    def key(self, level: int, arrival_s: float) -> float:
        return level * 1e9 + arrival_s


def _class_of(seconds: float) -> int:
    """Classes grow by `_RATIO`; class 0 is about one second."""
    return math.floor(math.log(max(seconds, 1e-9), _RATIO))
