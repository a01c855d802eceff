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

from scheduler.length_histogram import MAX_LENGTH
from scheduler.lengths import Lengths
from scheduler.policies.tail import TailRate

if TYPE_CHECKING:
    from scheduler.costs import CostModel
    from scheduler.gittins import GittinsIndex
    from scheduler.policies.base import Work

NUM_LEVELS = 40  # the lowest begins at about 700,000 output tokens
LEVELS_PER_DOUBLING = 2
MAX_EDGES_AHEAD = 8
SHORTEST_S = 1e-9  # whatever the cost model says, a token takes some time
TYPICAL_PROMPT = 1024  # tokens; sets gamma before anything was seen
TYPICAL_QUEUEING = 2.0  # time in the system per time with a place, near capacity


class LearnedFeedbackQueue:
    preemptive = True
    epoch = 0.0

    def __init__(
        self,
        costs: CostModel,
        chunk: int,
        places: int,
        gamma: float,
        max_head_start_s: float,
        lengths: Lengths,
    ) -> None:
        """`chunk`: tokens of a step; `places`: sequences of a step; `gamma` per second, 0 = adapted."""
        self.max_head_start_s = max_head_start_s
        self._costs, self._chunk, self._places = costs, chunk, places
        self._lengths = lengths
        self._num_live, self._live_s = 0, 0.0  # sequences here, and the service they were expected to need
        self._lowest_s = self._token_s(0)  # of w; level 1 begins above it
        prefill_s, token_s = costs.prefill(0, TYPICAL_PROMPT, chunk, places), self._token_s(TYPICAL_PROMPT)
        prior = Lengths().index("", TYPICAL_PROMPT)
        self._typical_w_s = token_s * prior.w(prefill_s / token_s, 0, MAX_LENGTH)
        service_s = prefill_s + token_s * prior.mean_left(0, MAX_LENGTH)
        # by Little's law a place is held for the service of one request of each place
        self._tail = None if gamma else TailRate(TYPICAL_QUEUEING * places * service_s)
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
        index = self._lengths.index(work.tenant, work.prompt_len)
        return self._w(work, index, work.num_left, work.num_output)

    def enter(self, work: Work) -> None:
        """Under first come first served it would wait for what all others are expected to need."""
        token_s = self._token_s(work.prompt_len)
        output = self._lengths.index(work.tenant, work.prompt_len).mean_left(0, work.max_output)
        work.expected_s = self._prefill_s(work.prompt_len, work.num_left) + output * token_s
        self._num_live += 1
        self._live_s += work.expected_s
        work.fcfs_s = self._live_s + min(self._num_live, self._places) * output * token_s

    def leave(self, work: Work) -> None:
        if work.expected_s:
            self._num_live -= 1
            self._live_s = self._live_s - work.expected_s if self._num_live else 0.0
            work.expected_s = 0.0

    def level(self, work: Work) -> int:
        return self._level_of(self.w(work))

    def next_change(self, work: Work) -> float:
        """At most a few edges ahead: what is learned meanwhile may move the later ones."""
        index = self._lengths.index(work.tenant, work.prompt_len)
        ahead = work.num_output
        for _ in range(MAX_EDGES_AHEAD):
            edge = index.next_edge(ahead)
            if edge is None or edge >= work.max_output:
                return math.inf
            ahead = edge
            if self._level_of(self._w(work, index, 0, ahead)) != work.level:
                break
        return ahead

    def key(self, level: int, arrival_s: float) -> float:
        return arrival_s - self._head_starts_s[level]

    def learn(self, work: Work, natural: bool) -> None:
        if self._tail and (natural or work.num_output >= work.max_output):
            index = self._lengths.index(work.tenant, work.prompt_len)
            w_on_arrival = self._w(work, index, num_left=work.prompt_len, num_output=0)
            if self._tail.add(work.fcfs_s, w_on_arrival, work.attained_s):
                self._use(self._tail.gamma)
        self._lengths.observe(work.tenant, work.prompt_len, work.num_output, natural)

    def _level_of(self, w: float) -> int:
        doublings = math.log2(max(w / self._lowest_s, 1.0))
        return min(int(doublings * LEVELS_PER_DOUBLING), NUM_LEVELS - 1)

    def _w(self, work: Work, index: GittinsIndex, num_left: int, num_output: int) -> float:
        context = work.prompt_len + num_output
        token_s = self._token_s(context)
        prefill_s = self._prefill_s(context, num_left)
        return token_s * index.w(prefill_s / token_s, num_output, work.max_output)

    def _prefill_s(self, context: int, num_left: int) -> float:
        if not num_left:
            return 0.0
        return self._costs.prefill(max(0, context - num_left), num_left, self._chunk, self._places)

    def _token_s(self, context: int) -> float:
        return max(self._costs.decode(context, self._places), SHORTEST_S)

    def _use(self, gamma: float) -> None:
        """Only differences of head starts matter. Where the bound is short of them all, it is spent around
        the typical w, and levels far above and below are not told apart."""
        self._gamma = gamma
        self.epoch += 1.0
        bound_s = self.max_head_start_s
        none_s = max(0.0, _boost(gamma, self._typical_w_s) - bound_s / 2)
        self._head_starts_s = [
            min(max(_boost(gamma, self._middle_s(level)) - none_s, 0.0), bound_s)
            for level in range(NUM_LEVELS)
        ]

    def _middle_s(self, level: int) -> float:
        """The w in the (geometric) middle of a level."""
        return float(self._lowest_s * 2.0 ** ((level + 0.5) / LEVELS_PER_DOUBLING))


def _boost(gamma: float, w: float) -> float:
    """(1 / gamma) ln(1 / (1 - exp(-gamma w))), also for tiny and huge gamma * w."""
    return -math.log(-math.expm1(-gamma * w)) / gamma
