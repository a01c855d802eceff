"""Decayed counts of output lengths in bins, and the distribution that they speak for.

A length is counted in a bin: exact up to 16 tokens, then bins that grow by a constant ratio. Counts halve
every `HALF_LIFE` observations, so that the distribution follows the traffic. A sequence that was cut (a
limit, an abort) would have been longer; it says only that it was at risk of ending in the bins before the
cut, which is what the estimator of Kaplan and Meier (1958) takes.
"""

from __future__ import annotations

import itertools
import math
from array import array
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_LENGTH = 131072  # longer ones share the last bin
HALF_LIFE = 4000.0  # observations
PRIOR_WEIGHT = 32.0  # observations
PRIOR_MEDIAN, PRIOR_SIGMA = 150.0, 1.2  # log-normal, as of chat: mean 300 tokens, 1 in 20 over 1000

_NUM_EXACT, _RATIO = 16, 1.12
_GROWTH = 2.0 ** (1.0 / HALF_LIFE)
_LARGEST_UNIT = 1e12
MAX_WEIGHT = 1.001 / (1.0 - 1.0 / _GROWTH)  # of all counts ever, saved ones (which are rounded) included


def _make_edges() -> tuple[int, ...]:
    edges = list(range(1, _NUM_EXACT + 1))
    while edges[-1] < MAX_LENGTH:
        edges.append(min(MAX_LENGTH, round(edges[-1] * _RATIO)))
    return (*edges, 2 * MAX_LENGTH)


EDGES = _make_edges()
"""Bin k holds the lengths in (EDGES[k - 1], EDGES[k]]."""


def _make_prior() -> tuple[float, ...]:
    def below(length: int) -> float:
        z = (math.log(length) - math.log(PRIOR_MEDIAN)) / PRIOR_SIGMA
        return (1.0 + math.erf(z / math.sqrt(2.0))) / 2.0

    reached = [0.0, *(below(edge) for edge in EDGES)]
    return tuple(max(1e-7, high - low) for low, high in itertools.pairwise(reached))


PRIOR = _make_prior()
"""What is believed before anything was seen; no bin is impossible."""


_NOTHING = array("d", [0.0]) * len(EDGES)


class Histogram:
    """Instead of shrinking all old counts, each observation weighs a little more than the one before."""

    __slots__ = ("_cut", "_ended", "_unit", "num_seen")

    def __init__(self, ended: Iterable[float] = _NOTHING, cut: Iterable[float] = _NOTHING) -> None:
        """The counts are per bin of `EDGES`, in units of the newest observation."""
        self._ended = array("d", ended)  # by the bin of the length
        self._cut = array("d", cut)  # by the first bin that was not survived whole
        self._unit = 1.0
        self.num_seen = round(self.weight)  # from here on not decayed

    def copy(self) -> Histogram:
        """As it is now. Hundreds are copied between two steps: arrays, as to copy a list takes ten times as
        long."""
        copied = Histogram.__new__(Histogram)
        copied._ended, copied._cut = self._ended[:], self._cut[:]
        copied._unit, copied.num_seen = self._unit, self.num_seen
        return copied

    def add(self, num_output: int, natural: bool) -> None:
        """One that ended by itself after `num_output` tokens, or was cut there."""
        self.num_seen += 1
        self._unit *= _GROWTH
        if natural:
            self._ended[min(bisect_left(EDGES, num_output), len(EDGES) - 1)] += self._unit
        else:
            self._add_cut(num_output)
        if self._unit > _LARGEST_UNIT:
            self._ended, self._cut = (array("d", counts) for counts in self.counts())
            self._unit = 1.0

    def _add_cut(self, num_output: int) -> None:
        """The share of the bin that it did survive is counted as having survived the bin. Else the few that
        end in a bin before a common limit would seem to be all that were at risk there."""
        own = bisect_right(EDGES, num_output)
        if own >= len(EDGES) - 1:
            self._cut[-1] += self._unit
            return
        low = EDGES[own - 1] if own else 0
        survived = (num_output - low) / (EDGES[own] - low)
        self._cut[own] += self._unit * (1.0 - survived)
        self._cut[own + 1] += self._unit * survived

    def counts(self) -> tuple[list[float], list[float]]:
        """Ended and cut, in units of the newest observation."""
        return [count / self._unit for count in self._ended], [count / self._unit for count in self._cut]

    @property
    def weight(self) -> float:
        """In units of the newest observation."""
        return (sum(self._ended) + sum(self._cut)) / self._unit

    def masses(self, prior: tuple[float, ...]) -> tuple[float, ...]:
        """The probability of each bin, none of them zero, with `prior` worth `PRIOR_WEIGHT` observations."""
        ended, cut = self.counts()
        ended = [count + PRIOR_WEIGHT * mass for count, mass in zip(ended, prior, strict=True)]
        at_risk = _sums_from(ended, 0), _sums_from(cut, 1)
        alive, masses = 1.0, []
        for count, ending, cutting in zip(ended, *at_risk, strict=True):
            masses.append(alive * count / (ending + cutting))
            alive -= masses[-1]
        return tuple(masses)


def _sums_from(counts: list[float], shift: int) -> list[float]:
    """For each bin k, the sum of bins k + shift and later."""
    sums = [0.0] * (len(counts) + shift)
    for k in range(len(counts) - 1, -1, -1):
        sums[k] = sums[k + 1] + counts[k] if k + 1 < len(sums) else counts[k]
    return sums[shift:]
