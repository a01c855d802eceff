"""How fast the tail of the time in the system decays: the one knob of the learned levels, adapted.

If P(time in system > t) falls like exp(-gamma t) under first come first served, then head starts made with
this gamma are the best for the tail (Yu and Scully, "Strongly tail-optimal scheduling in the light-tailed
M/G/1", 2024); a smaller gamma favours the mean. 1/gamma is a time, and here it is a fixed share of the mean
time in the system. The mean is what can be observed with few data and does not run away: a gamma that is
too small for the tail lowers the mean, and so raises gamma again. And it is free of scale: on a machine that
is 20 times slower gamma becomes 20 times smaller.
"""

from __future__ import annotations

TAIL_PER_MEAN = 1.0  # 1/gamma in units of the mean time in the system
HALF_LIFE = 500.0  # sequences that ended
PRIOR_WEIGHT = 50.0  # sequences that the expected time counts for
MAX_OUTLIER = 20.0  # one time counts for at most this many means
MAX_FACTOR = 1000.0  # between the expected mean time and what is believed of it
MIN_CHANGE = 0.1  # relative; smaller ones are not worth new head starts


class TailRate:
    def __init__(self, expected_s: float) -> None:
        """`expected_s`: the mean time in the system, as far as it can be told before anything was seen."""
        self._expected_s = expected_s
        self._mean_s = expected_s
        self._weight = PRIOR_WEIGHT
        self.gamma = 1.0 / (TAIL_PER_MEAN * expected_s)

    def add(self, time_s: float) -> bool:
        """A sequence ended `time_s` after its arrival. Returns whether `gamma`, per second, was changed."""
        decay = 2.0 ** (-1.0 / HALF_LIFE)
        self._weight = self._weight * decay + 1.0
        self._mean_s += (min(time_s, MAX_OUTLIER * self._mean_s) - self._mean_s) / self._weight
        lowest_s, highest_s = self._expected_s / MAX_FACTOR, self._expected_s * MAX_FACTOR
        self._mean_s = min(max(self._mean_s, lowest_s), highest_s)
        gamma = 1.0 / (TAIL_PER_MEAN * self._mean_s)
        if abs(gamma - self.gamma) <= MIN_CHANGE * self.gamma:
            return False
        self.gamma = gamma
        return True
