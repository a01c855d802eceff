"""Who may come in: a bounded number of sequences, and nobody while the server drains."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from server.errors import invalid
from server.refusals import Refusal, draining
from server.retry_after import FinishRate, retry_after
from server.tenants import TenantLimits

if TYPE_CHECKING:
    from collections.abc import Callable


class Ticket:
    """Places of one HTTP request; each of its sequences gives one back, `close` the rest."""

    def __init__(self, admission: Admission, tenant: str, places: int) -> None:
        self._admission = admission
        self._tenant = tenant
        self._places = places

    def release_one(self, *, finished: bool = True) -> None:
        """Not `finished`: the sequence was never served."""
        if self._places:
            self._places -= 1
            self._admission._release(self._tenant, 1, finished=finished)

    def charge(self, tokens: int) -> None:
        """Tokens that the tenant used; negative ones are given back."""
        self._admission.tenants.charge(self._tenant, tokens)

    def close(self) -> None:
        places, self._places = self._places, 0
        self._admission._release(self._tenant, places, finished=False)
        self._admission._forget_ticket()


class Admission:
    """Counts sequences accepted and not yet finished. Used on the event loop only."""

    def __init__(
        self,
        capacity: int,
        clock: Callable[[], float] = time.monotonic,
        tenants: TenantLimits | None = None,
    ) -> None:
        self.capacity = capacity
        self.tenants = tenants or TenantLimits()
        self.draining = False
        self.in_flight = 0  # sequences
        self.busy_since_s = 0.0  # when in_flight last rose from 0
        self._tickets = 0  # HTTP requests
        self._idle = asyncio.Event()
        self._idle.set()
        self._clock = clock
        self._finished = FinishRate(clock)

    def reserve(self, tenant: str, places: int) -> Ticket:
        """Take places for the sequences of one request, or raise the 400, 429 or 503 that says why not."""
        if self.draining:
            raise draining()
        if places > self.capacity:
            raise invalid(f"The request asks for {places} sequences; the server takes {self.capacity}.", "n")
        self.tenants.check(tenant, places)
        if self.in_flight + places > self.capacity:
            raise self._full(places)
        self.tenants.enter(tenant, places)
        if not self.in_flight:
            self.busy_since_s = self._clock()
        self.in_flight += places
        self._tickets += 1
        self._idle.clear()
        return Ticket(self, tenant, places)

    async def wait_idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()

    def _full(self, places: int) -> Refusal:
        message = (
            f"The queue is full: {self.in_flight} sequences in flight, at most {self.capacity}. Retry later."
        )
        return Refusal(429, message, reason="queue_full", headers=retry_after(self._finished.wait_s(places)))

    def _release(self, tenant: str, places: int, *, finished: bool) -> None:
        self.tenants.leave(tenant, places, finished=finished)
        self.in_flight -= places
        assert self.in_flight >= 0
        if finished:
            self._finished.note()

    def _forget_ticket(self) -> None:
        self._tickets -= 1
        if not self._tickets:
            self._idle.set()
