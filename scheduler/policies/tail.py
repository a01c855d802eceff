"""gamma, the one knob of the learned levels, adapted to what is seen.

If P(time in system > t) falls like exp(-gamma t) under first come first served, head starts made with that
gamma are the best for the far tail (Yu and Scully, "Strongly tail-optimal scheduling in the light-tailed
M/G/1", 2024); a smaller one favours the mean. Real arrivals are too bursty for the far tail to be seen in
time, so gamma is set by what head starts do: those of two sequences differ by about (1/gamma) times the
difference of their ln w, which is how far one is let past the other. Made a fixed share of the mean time in
the system, this keeps the 99th percentile near that of first come first served, on chat and on heavy-tailed
work alike:

    spread of ln w / gamma = SHARE * mean time in the system

The mean is a slow one, so that gamma does not follow a burst: the large head starts that a burst asks
for would reach exactly those who waited longest. It does not run away: a gamma that is too small lowers the
mean, which raises gamma again. And it has no scale: on a machine that is 20 times slower gamma becomes 20
times smaller.
"""

from __future__ import annotations

import math

SHARE = 0.5  # replays of chat and code near capacity: more brings the p99 above 1.15 times that of fcfs
HALF_LIFE = 8000.0  # sequences that ended
PRIOR_WEIGHT = 50.0  # sequences that what is expected counts for
EXPECTED_SPREAD = 1.0  # standard deviation of ln w among arrivals; 0.4 for chat, 1 for code
MIN_SPREAD = 0.2  # equal sequences need no head starts, and get no huge ones
MAX_FACTOR = 1000.0  # between the expected mean time and what is believed of it
MAX_OUTLIER = 20.0  # one time counts for at most this many means
MIN_CHANGE = 0.1  # relative; smaller ones are not worth new head starts


class TailRate:
    def __init__(self, expected_s: float) -> None:
        """`expected_s`: the mean time in the system, as far as it can be told before anything was seen."""
        self._shortest_s, self._longest_s = expected_s / MAX_FACTOR, expected_s * MAX_FACTOR
        self._mean_s = expected_s
        self._mean_ln_w: float | None = None
        self._variance = EXPECTED_SPREAD**2
        self._weight = PRIOR_WEIGHT
        self.gamma = self._wanted()

    def add(self, time_s: float, w: float) -> bool:
        """A sequence ended `time_s` after its arrival, when it had been at `w` seconds. Returns whether
        `gamma`, per second, was changed."""
        self._weight = self._weight * 2.0 ** (-1.0 / HALF_LIFE) + 1.0
        mean_s = self._mean_s + (min(time_s, MAX_OUTLIER * self._mean_s) - self._mean_s) / self._weight
        self._mean_s = min(max(mean_s, self._shortest_s), self._longest_s)
        self._learn_spread(math.log(w))
        gamma = self._wanted()
        if abs(gamma - self.gamma) <= MIN_CHANGE * self.gamma:
            return False
        self.gamma = gamma
        return True

    def _wanted(self) -> float:
        return max(math.sqrt(self._variance), MIN_SPREAD) / (SHARE * self._mean_s)

    def _learn_spread(self, ln_w: float) -> None:
        before = ln_w if self._mean_ln_w is None else self._mean_ln_w
        self._mean_ln_w = before + (ln_w - before) / self._weight
        self._variance += ((ln_w - before) * (ln_w - self._mean_ln_w) - self._variance) / self._weight
