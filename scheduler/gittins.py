"""The Gittins index of a sequence whose output length is known as a distribution only.

The best that a queue can do without knowing lengths is to serve whoever has the largest chance of ending
per cost spent (Gittins; Aalto, Ayesta and Righter, 2009). Here the inverse is used, w, a cost: for a sequence
that still needs c of prefill and has had `a` output tokens,

    w(c, a, cap) = min over d of (c + E[min(X' - a, d) | X' > a]) / P(X' - a <= d | X' > a)

with X' = min(X, cap), since a sequence surely ends at its limit. Everything is in units of the cost of one
output token. Known lengths make w the remaining work; memoryless ones make it a constant.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_ROWS = 512  # kept envelopes of one distribution
NEGLIGIBLE = 1e-12  # of those alive: ending in such a bin changes nothing


@dataclass(frozen=True, slots=True)
class _Envelope:
    """The lower envelope of lines slope * c + intercept: line i is the lowest from c = starts[i] on."""

    starts: list[float]
    slopes: list[float]
    intercepts: list[float]

    def at(self, c: float) -> float:
        line = bisect_right(self.starts, c) - 1
        return self.slopes[line] * c + self.intercepts[line]


class GittinsIndex:
    """Answers for one distribution over bins: bin k holds the lengths in (edges[k - 1], edges[k]], evenly
    spread, with `masses[k]` of probability (they need not sum to one; the last is positive).

    For given `a` and `cap`, each stopping point d is a line in c. The lower envelope of the lines is made
    when first asked for, in time linear in the bins; after that an answer is two searches. `a` is rounded
    down to an edge, the stopping points are edges and the cap.
    """

    def __init__(self, edges: Sequence[int], masses: Sequence[float]) -> None:
        self._edges = edges
        self._masses = masses
        lower = [0, *edges[:-1]]
        self._lower = lower
        self._means = [(low + 1 + high) / 2 for low, high in zip(lower, edges, strict=True)]
        survivors, beyond = [0.0], [0.0]  # from the last bin on: probability, and length times probability
        for mass, mean in zip(reversed(masses), reversed(self._means), strict=True):
            survivors.append(survivors[-1] + mass)
            beyond.append(beyond[-1] + mass * mean)
        self._survivors = survivors[::-1]
        self._beyond = beyond[::-1]
        self._rows: dict[tuple[int, int], _Envelope] = {}

    def w(self, c: float, a: int, cap: int) -> float:
        """In output tokens; more than 0. `c` >= 0 is the cost of the prefill in output tokens."""
        own = self._bin_after(a)
        last = max(own, bisect_left(self._edges, cap))  # the cap's bin
        to_the_end = c + self._left(own, last, cap)
        if last == own:
            return to_the_end
        row = self._rows.get((own, last)) or self._make_row(own, last)
        return min(row.at(c), to_the_end)

    def mean_left(self, a: int, cap: int) -> float:
        """The expected output tokens that a sequence with `a` of at most `cap` is still to have."""
        own = self._bin_after(a)
        return self._left(own, max(own, bisect_left(self._edges, cap)), cap)

    def next_edge(self, a: int) -> int | None:
        """The next number of output tokens at which the answers may change; None after the last edge."""
        following = bisect_right(self._edges, a)
        return self._edges[following] if following < len(self._edges) else None

    def _bin_after(self, a: int) -> int:
        return min(bisect_right(self._edges, a), len(self._edges) - 1)

    def _left(self, own: int, last: int, cap: int) -> float:
        """E[X' - a | X' > a], with `a` at the lower edge of bin `own` and the cap in bin `last`."""
        if last >= len(self._edges):
            return self._beyond[own] / self._survivors[own] - self._lower[own]
        low, high = self._lower[last], self._edges[last]
        inside = min(max(cap, low + 1), high)  # of the cap's bin, the lengths that the cap leaves alone
        capped_mean = ((inside - low) * (low + 1 + inside) / 2 + (high - inside) * inside) / (high - low)
        total = self._beyond[own] - self._beyond[last]
        total += self._masses[last] * capped_mean + self._survivors[last + 1] * inside
        return total / self._survivors[own] - self._lower[own]

    def _make_row(self, own: int, last: int) -> _Envelope:
        """The envelope over stopping at the upper edges of bins own .. last - 1."""
        a, alive = self._lower[own], self._survivors[own]
        starts: list[float] = []
        slopes: list[float] = []
        intercepts: list[float] = []
        ended = spent = 0.0
        for k in range(own, last):
            mass = self._masses[k]
            if mass <= NEGLIGIBLE * alive:
                continue
            ended += mass
            spent += mass * (self._means[k] - a)
            slope = alive / ended  # falls with k, so the envelope is a stack
            intercept = (spent + self._survivors[k + 1] * (self._edges[k] - a)) / ended
            start = 0.0
            while slopes:
                start = (intercept - intercepts[-1]) / (slopes[-1] - slope) if slopes[-1] > slope else 0.0
                if start > starts[-1]:
                    break
                start = 0.0
                del starts[-1], slopes[-1], intercepts[-1]
            starts.append(start)
            slopes.append(slope)
            intercepts.append(intercept)
        row = _Envelope(starts, slopes, intercepts) if starts else _NEVER
        if len(self._rows) >= MAX_ROWS:
            self._rows.clear()
        self._rows[own, last] = row
        return row


_NEVER = _Envelope([0.0], [0.0], [float("inf")])  # nothing ends before the cap's bin
