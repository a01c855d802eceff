"""Feedback queue whose levels are learned: classes of w = 1 / Gittins index, with bounded head starts.

w is the expected cost per chance of ending soon, in seconds of attributed service, given the prefill that is
still to do, the output so far and the output lengths learned from others (scheduler/gittins.py). Where
lengths are light-tailed it makes the order that of arrival, where they are heavy-tailed that of least
attained service, and nobody has to choose a quantum.

Among those who want a place the order is by arrival minus the head start of the level,

    head_start(w) = (1 / gamma) ln(1 / (1 - exp(-gamma w)))

(the boost of Yu and Scully, 2024), at most `max_head_start_s`. So nobody is overtaken by one that came later
by more than that, nobody starves, and overload degrades to first come first served.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scheduler.policies.tail import TailRate

if TYPE_CHECKING:
    from scheduler.clock import Clock
    from scheduler.costs import CostModel
    from scheduler.lengths import Lengths
    from scheduler.policies.base import Work

NUM_LEVELS = 40  # the lowest begins at about 700,000 output tokens
LEVELS_PER_DOUBLING = 2
TYPICAL_PROMPT = 1024  # tokens; sets gamma before anything was seen
TYPICAL_QUEUEING = 2.0  # time in the system per time with a place, near capacity


class LearnedFeedbackQueue:
    preemptive = True

    def __init__(
        self,
        costs: CostModel,
        chunk: int,
        places: int,
        gamma: float,
        max_head_start_s: float,
        clock: Clock,
        lengths: Lengths,
    ) -> None:
        """`chunk`: tokens of a step; `places`: sequences of a step; `gamma` per second, 0 = adapted."""
        self.max_head_start_s = max_head_start_s
        self._costs, self._chunk, self._places = costs, chunk, places
        self._clock, self._lengths = clock, lengths
        self._lowest_s = costs.decode(0, places)  # where level 1 begins
        self._tail = None if gamma else TailRate(self._expected_s())
        self._use(self._tail.gamma if self._tail else gamma)

    @property
    def gamma(self) -> float:
        """Per second, as used now."""
        return self._gamma

    @property
    def lengths(self) -> Lengths:
        return self._lengths

    def w(self, work: Work) -> float:
        """Seconds of service that it is expected to cost per chance of ending."""
        context = work.prompt_len + work.num_output
        token_s = self._costs.decode(context, self._places)
        left = work.num_left
        prefill_s = (
            self._costs.prefill(max(0, context - left), left, self._chunk, self._places) if left else 0.0
        )
        index = self._lengths.index(work.tenant, work.prompt_len)
        return token_s * index.w(prefill_s / token_s, work.num_output, work.max_output)

    def level(self, work: Work) -> int:
        doublings = math.log2(max(self.w(work) / self._lowest_s, 1.0))
        return min(int(doublings * LEVELS_PER_DOUBLING), NUM_LEVELS - 1)

    def next_change(self, work: Work) -> float:
        edge = self._lengths.index(work.tenant, work.prompt_len).next_edge(work.num_output)
        return math.inf if edge is None or edge >= work.max_output else edge

    def key(self, level: int, arrival_s: float) -> float:
        return arrival_s - self._head_starts_s[level]

    def learn(self, work: Work, natural: bool) -> None:
        self._lengths.observe(work.tenant, work.prompt_len, work.num_output, natural)
        served_whole = natural or work.num_output >= work.max_output
        if self._tail and served_whole and self._tail.add(self._clock() - work.arrival_s):
            self._use(self._tail.gamma)

    def _use(self, gamma: float) -> None:
        self._gamma = gamma
        self._head_starts_s = [
            min(_boost(gamma, self._middle_s(level)), self.max_head_start_s) for level in range(NUM_LEVELS)
        ]

    def _middle_s(self, level: int) -> float:
        """The w in the (geometric) middle of a level."""
        return float(self._lowest_s * 2.0 ** ((level + 0.5) / LEVELS_PER_DOUBLING))

    def _expected_s(self) -> float:
        """The time in the system of a typical request: with a place it spends, by Little's law, the service
        of one request for each place."""
        costs, places = self._costs, self._places
        num_output = self._lengths.index("", TYPICAL_PROMPT).mean_left(0, TYPICAL_PROMPT)
        prefill_s = costs.prefill(0, TYPICAL_PROMPT, self._chunk, places)
        service_s = prefill_s + num_output * costs.decode(TYPICAL_PROMPT, places)
        return TYPICAL_QUEUEING * places * service_s


def _boost(gamma: float, w: float) -> float:
    """(1 / gamma) ln(1 / (1 - exp(-gamma w))), also for tiny and huge gamma * w."""
    return -math.log(-math.expm1(-gamma * w)) / gamma
