"""Who may come in: a bounded number of sequences, and nobody while the server drains."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from typing import TYPE_CHECKING

from server.errors import ApiError, invalid, unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_RETRY_AFTER_S = 60
RATE_WINDOW = 64  # completions that the estimate of the rate looks back on


class Ticket:
    """Places of one HTTP request; each of its sequences gives one back, `close` the rest."""

    def __init__(self, admission: Admission, places: int) -> None:
        self._admission = admission
        self._places = places

    def release_one(self) -> None:
        if self._places:
            self._places -= 1
            self._admission._release(1, finished=True)

    def close(self) -> None:
        places, self._places = self._places, 0
        self._admission._release(places, finished=False)
        self._admission._forget_ticket()


class Admission:
    """Counts sequences accepted and not yet finished. Used on the event loop only."""

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity = capacity
        self.draining = False
        self.in_flight = 0  # sequences
        self.busy_since_s = 0.0  # when in_flight last rose from 0
        self._tickets = 0  # HTTP requests
        self._idle = asyncio.Event()
        self._idle.set()
        self._clock = clock
        self._finish_times: deque[float] = deque(maxlen=RATE_WINDOW)

    def reserve(self, places: int) -> Ticket:
        """Take places for the sequences of one request, or raise the 400, 429 or 503 that says why not."""
        if self.draining:
            raise unavailable("The server is shutting down.", 5, "draining")
        if places > self.capacity:
            raise invalid(f"The request asks for {places} sequences; the server takes {self.capacity}.", "n")
        if self.in_flight + places > self.capacity:
            raise self._full(places)
        if not self.in_flight:
            self.busy_since_s = self._clock()
        self.in_flight += places
        self._tickets += 1
        self._idle.clear()
        return Ticket(self, places)

    async def wait_idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()

    def retry_after_s(self, places: int = 1) -> int:
        """Whole seconds until that many places are likely free, from the rate of recent completions."""
        times = self._finish_times
        if len(times) < 2:
            return 1
        rate = (len(times) - 1) / max(self._clock() - times[0], 1e-3)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(places / rate)))

    def _full(self, places: int) -> ApiError:
        message = (
            f"The queue is full: {self.in_flight} sequences in flight, at most {self.capacity}. Retry later."
        )
        headers = {"retry-after": str(self.retry_after_s(places))}
        return ApiError(429, message, code="queue_full", headers=headers)

    def _release(self, places: int, *, finished: bool) -> None:
        self.in_flight -= places
        assert self.in_flight >= 0
        if finished:
            self._finish_times.append(self._clock())

    def _forget_ticket(self) -> None:
        self._tickets -= 1
        if not self._tickets:
            self._idle.set()
