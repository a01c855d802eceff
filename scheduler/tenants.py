"""Whose turn it is among tenants: virtual token counters (VTC, Sheng et al., OSDI'24), kept in seconds of
attributed service divided by the tenant's weight.

The least served tenant goes first. One that comes back after a pause is lifted to the least served of
those who stayed, or if nobody did, to the one that went last. So nobody saves up a claim while idle.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_IDLE_TENANTS = 10_000  # remembered; beyond that the longest idle are forgotten


class LazyMinimum:
    """The number with the least value, where values only grow: an entry that is out of date stands too
    early in the heap, and is put right when it surfaces."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._present: set[int] = set()

    def push(self, number: int, value: float) -> None:
        if number not in self._present:
            self._present.add(number)
            heapq.heappush(self._heap, (value, number))

    def keep(self, entries: dict[int, float]) -> None:
        """Only these take part; call it when most others have gone."""
        self._present = set(entries)
        self._heap = [(value, number) for number, value in entries.items()]
        heapq.heapify(self._heap)

    def is_stale(self, num_left: int) -> bool:
        """Whether most of what is remembered has gone."""
        return len(self._heap) > 2 * num_left + 16

    def first(self, value_of: Callable[[int], float | None]) -> int | None:
        """`value_of` gives the value now, or None for a number that does not take part any more."""
        while self._heap:
            value, number = self._heap[0]
            now = value_of(number)
            if now == value:
                return number
            if now is None:
                heapq.heappop(self._heap)
                self._present.discard(number)
            else:
                heapq.heapreplace(self._heap, (now, number))
        return None


@dataclass(slots=True, eq=False)
class Tenant:
    number: int
    name: str
    weight: float = 1.0
    served_s: float = 0.0  # the virtual counter
    num_live: int = 0  # sequences that wait or run
    num_running: int = 0


class Tenants:
    def __init__(self, weights: dict[str, float], max_running: int = 0) -> None:
        self.active: dict[str, Tenant] = {}
        self._weights = weights
        self._max_running = max_running
        self._idle: OrderedDict[str, Tenant] = OrderedDict()
        self._by_number: dict[int, Tenant] = {}  # the active ones
        self._least_served = LazyMinimum()
        self._last_s = 0.0  # the counter of the last one that went
        self._next_number = 0

    def enter(self, name: str) -> Tenant:
        """A sequence of the tenant comes to live."""
        tenant = self.active.get(name)
        if tenant is None:
            tenant = self._idle.pop(name, None) or self._new(name)
            least = self._least_served.first(self.served_s)
            least_s = self._last_s if least is None else self._by_number[least].served_s
            tenant.served_s = max(tenant.served_s, least_s)
            self.active[name] = self._by_number[tenant.number] = tenant
            self._least_served.push(tenant.number, tenant.served_s)
        tenant.num_live += 1
        return tenant

    def leave(self, name: str) -> None:
        tenant = self.active[name]
        tenant.num_live -= 1
        if not tenant.num_live:
            assert not tenant.num_running, "a tenant that is gone still runs"
            del self.active[name], self._by_number[tenant.number]
            self._last_s = tenant.served_s
            if self._least_served.is_stale(len(self._by_number)):
                self._least_served.keep({one.number: one.served_s for one in self.active.values()})
            self._idle[name] = tenant
            if len(self._idle) > MAX_IDLE_TENANTS:
                self._idle.popitem(last=False)

    def charge(self, name: str, seconds: float) -> None:
        tenant = self.active[name]
        tenant.served_s += seconds / tenant.weight

    def served_s(self, number: int) -> float | None:
        """The virtual counter of an active tenant."""
        tenant = self._by_number.get(number)
        return None if tenant is None else tenant.served_s

    def may_run(self, tenant: Tenant) -> bool:
        return not self._max_running or tenant.num_running < self._max_running

    def _new(self, name: str) -> Tenant:
        self._next_number += 1
        return Tenant(self._next_number, name, self._weights.get(name, 1.0))


def parse_weights(entries: Iterable[str]) -> dict[str, float]:
    """`name=weight` entries. Raises ValueError naming the one that is wrong."""
    weights = {}
    for entry in entries:
        name, _, text = entry.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not name or not 0.0 < weight < 1e6:
            raise ValueError(f"scheduler.tenant_weights: {entry!r} is not name=weight with a positive weight")
        weights[name] = weight
    return weights
