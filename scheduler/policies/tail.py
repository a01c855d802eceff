"""gamma, the one knob of the learned levels, adapted to what is seen.

Head starts move delay between sequences and make none: near capacity, one of head start H comes later than
under first come first served by about

    D = (mean of all head starts, each weighted with the service it stands for) - H

With head starts of (1/gamma) ln(1/w) that is z / gamma, where z = ln w - (mean of ln w weighted with
service). A tail of times that falls like exp(-t / tau) is moved, by delays D that do not depend on t, to the
right by

    tau ln E[exp(D / tau)] = tau ln E[exp(z / (gamma tau))]

the mean being over sequences. (Minimising this is what the boost of Yu and Scully does.) Weaker head starts
than a certain strength u = 1 / (gamma tau) make the tail shorter, stronger ones longer; gamma is chosen for
that strength, where the far tail is that of first come first served:

    E[exp(u z)] = 1,    gamma = 1 / (u tau)

Real times have no exponential tail, least of all with bursts. tau is taken as

    TAU * (99th percentile) * (99th percentile / mean)

of the times that first come first served would give, estimated on arrival from the service that those present
are expected to need: the policy's own effect is not in it, so nothing feeds back. Where times are long for
everybody (overload), the second ratio is small, and delays move many across the percentile; where they are
long for few, it is large. Times and sizes are slow averages, so that gamma does not follow a burst: the large
head starts that a burst asks for would reach exactly those who waited longest. Nothing here has a scale: on a
machine that is 20 times slower gamma becomes 20 times smaller.
"""

from __future__ import annotations

import math

TAIL = 0.99
TAU = 0.055  # in replays of chat near capacity 0.065 brings the p99 above 1.15 times that of fcfs
MAX_RATIO = 8.0  # of the 99th percentile to the mean, as far as it is believed
HALF_LIFE = 8000.0  # sequences that ended
PRIOR_WEIGHT = 100.0  # sequences that the expected strength counts for
PRIOR_TAIL_WEIGHT = 10.0  # sequences that the expected tail counts for: 1 % of the first thousand
EXPECTED_TAIL = 3.0  # 99th percentile over mean, before anything was seen
EXPECTED_STRENGTH = 2.0
MAX_STRENGTH = 6.0
UPDATE_EVERY = 50  # sequences
MIN_CHANGE = 0.1  # relative; smaller ones are not worth new head starts

_HALVINGS = 12
_BINS_PER_DOUBLING = 6
_LOWEST = -30  # 2**-30 s, and everything below
_NUM_BINS = 60 * _BINS_PER_DOUBLING


class _LogHistogram:
    """Weights by the logarithm of a time."""

    def __init__(self) -> None:
        self._weights = [0.0] * _NUM_BINS

    def add(self, seconds: float, weight: float) -> None:
        number = int((math.log2(max(seconds, 1e-12)) - _LOWEST) * _BINS_PER_DOUBLING)
        self._weights[min(max(number, 0), _NUM_BINS - 1)] += weight

    def scale(self, factor: float) -> None:
        self._weights = [weight * factor for weight in self._weights]

    def quantile(self, share: float) -> float:
        left = share * math.fsum(self._weights)
        for number, weight in enumerate(self._weights):
            left -= weight
            if left <= 0.0 and weight:
                return self._middle(number)
        return self._middle(_NUM_BINS - 1)

    def mean(self) -> float:
        total = math.fsum(self._weights)
        return math.fsum(weight * self._middle(k) for k, weight in enumerate(self._weights) if weight) / total

    def logs(self) -> list[tuple[float, float]]:
        """(ln of the time, weight) of what is there; the weights add up to 1."""
        total = math.fsum(self._weights)
        return [
            (math.log(self._middle(number)), weight / total)
            for number, weight in enumerate(self._weights)
            if weight
        ]

    @staticmethod
    def _middle(number: int) -> float:
        return float(2.0 ** ((number + 0.5) / _BINS_PER_DOUBLING + _LOWEST))


class TailRate:
    def __init__(self, expected_s: float) -> None:
        """`expected_s`: the mean time in the system, as far as it can be told before anything was seen."""
        times = ((1.0, 0.75), (EXPECTED_TAIL, 0.25))  # of it, with their shares
        self._times, self._sizes, self._service = _LogHistogram(), _LogHistogram(), _LogHistogram()
        self._num_seen = 0
        self._newest = 1.0  # the weight of the newest observation; older ones weigh less and less
        for factor, share in times:
            self._times.add(factor * expected_s, share * PRIOR_TAIL_WEIGHT)
        self.gamma = self._wanted()

    def add(self, time_s: float, w: float, service_s: float) -> bool:
        """A sequence ended that would have been in the system for about `time_s` under first come first
        served; on arrival it had been at `w` seconds; `service_s` were attributed to it. Returns whether
        `gamma`, per second, was changed."""
        self._newest *= 2.0 ** (1.0 / HALF_LIFE)
        self._times.add(time_s, self._newest)
        self._sizes.add(w, self._newest)
        self._service.add(w, self._newest * service_s)
        self._num_seen += 1
        if self._num_seen % UPDATE_EVERY:
            return False
        if self._newest > 1e6:
            for histogram in (self._times, self._sizes, self._service):
                histogram.scale(1.0 / self._newest)
            self._newest = 1.0
        gamma = self._wanted()
        if abs(gamma - self.gamma) <= MIN_CHANGE * self.gamma:
            return False
        self.gamma = gamma
        return True

    def _wanted(self) -> float:
        trust = self._num_seen / (self._num_seen + PRIOR_WEIGHT)
        strength = (1.0 - trust) * EXPECTED_STRENGTH + (trust * self._strength() if trust else 0.0)
        tail_s = self._times.quantile(TAIL)
        return 1.0 / (strength * TAU * tail_s * min(tail_s / self._times.mean(), MAX_RATIO))

    def _strength(self) -> float:
        """The u > 0 with E[exp(u z)] = 1. The left side is 1 at 0, falls at first and is convex; without
        any spread of z it stays 1, and the strength does not matter."""
        middle = math.fsum(log * weight for log, weight in self._service.logs())
        sizes = [(log - middle, weight) for log, weight in self._sizes.logs()]
        low, high = 0.0, MAX_STRENGTH
        for _ in range(_HALVINGS):
            u = (low + high) / 2
            moved = math.fsum(weight * math.exp(u * z) for z, weight in sizes)
            low, high = (u, high) if moved <= 1.0 else (low, u)
        return (low + high) / 2
