"""The worker threads of the text side: parsing, tokenising and rendering never hold up the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

RETRY_AFTER_S = 1


class TextThreads:
    """`run` is for those who hold a place in the queue, which bounds them; `run_bounded` for all others."""

    def __init__(self, num_threads: int, max_waiting: int) -> None:
        self._limiter = anyio.CapacityLimiter(num_threads)
        self._num_threads = num_threads
        self._max_waiting = max_waiting
        self._jobs = 0  # counted here: a job lets others run before the limiter knows of it

    async def run(self, work: Callable[[], T]) -> T:
        self._jobs += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._jobs -= 1

    async def run_bounded(self, work: Callable[[], T]) -> T:
        """Raises the 429 when no thread is free and too many wait."""
        waiting = self._jobs - self._num_threads
        if waiting >= self._max_waiting:
            message = f"{waiting} text jobs are waiting, at most {self._max_waiting} may. Retry later."
            raise ApiError(429, message, code="text_queue_full", headers={"retry-after": str(RETRY_AFTER_S)})
        return await self.run(work)
