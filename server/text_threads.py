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
        self._max_waiting = max_waiting

    async def run(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    async def run_bounded(self, work: Callable[[], T]) -> T:
        """Raises the 429 when no thread is free and too many wait."""
        busy = self._limiter.statistics()
        if busy.borrowed_tokens >= busy.total_tokens and busy.tasks_waiting >= self._max_waiting:
            message = (
                f"{busy.tasks_waiting} text jobs are waiting, at most {self._max_waiting} may. Retry later."
            )
            raise ApiError(429, message, code="text_queue_full", headers={"retry-after": str(RETRY_AFTER_S)})
        return await self.run(work)
