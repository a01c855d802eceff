"""Who waits: by policy, but those that were put aside for too long go first, by arrival."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from scheduler.replay.ranking import Ranking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.policies.base import Policy
    from scheduler.replay.job import Job


class Queue:
    def __init__(self, policy: Policy, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._ranking = Ranking(policy, jobs)
        self._pinned: set[int] = set()
        self._pinned_heap: list[int] = []

    def __len__(self) -> int:
        return len(self._ranking) + len(self._pinned)

    def add(self, job: Job) -> None:
        if job.pinned:
            self._pinned.add(job.number)
            heappush(self._pinned_heap, job.number)
        else:
            self._ranking.add(job)

    def remove(self, job: Job) -> None:
        self._pinned.discard(job.number)
        self._ranking.remove(job)

    def peek(self, *, past_pinned: bool = False) -> Job | None:
        if past_pinned:
            return self._ranking.peek()
        heap = self._pinned_heap
        while heap and heap[0] not in self._pinned:
            heappop(heap)
        return self._jobs[heap[0]] if heap else self._ranking.peek()

    def last_pinned_with_pages(self) -> Job | None:
        """On the device."""
        numbers = (number for number in self._pinned if self._jobs[number].device_pages)
        last = max(numbers, default=-1)
        return None if last < 0 else self._jobs[last]
