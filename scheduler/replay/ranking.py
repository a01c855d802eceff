"""Jobs in policy order, of which the first or the last is asked for."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.policies.base import Policy
    from scheduler.replay.job import Job


class Ranking:
    """A heap per level, because within a level the order is that of arrival whatever the policy's keys do.

    Removal is lazy: an entry counts while its job is a member with that level. Adding and removing are
    O(log n), the first or last one O(levels).
    """

    def __init__(self, policy: Policy, jobs: Sequence[Job], *, last: bool = False) -> None:
        self._key = policy.key
        self._jobs = jobs
        self._sign = -1 if last else 1
        self._members: dict[int, int] = {}  # number -> level
        self._heaps: dict[int, list[int]] = {}
        self._num_entries = 0

    def __len__(self) -> int:
        return len(self._members)

    def add(self, job: Job) -> None:
        """Adds it, or moves it to its present level."""
        number, level = job.number, job.level
        if self._members.get(number) == level:
            return
        self._members[number] = level
        heappush(self._heaps.setdefault(level, []), self._sign * number)
        self._num_entries += 1
        if self._num_entries > 3 * len(self._members) + 64:
            self._sweep()

    def remove(self, job: Job) -> None:
        self._members.pop(job.number, None)

    def peek(self) -> Job | None:
        """The first one, or the last one, by key and then by arrival."""
        best: tuple[float, int] | None = None
        sign, members, jobs = self._sign, self._members, self._jobs
        for level in list(self._heaps):
            heap = self._heaps[level]
            while heap and members.get(sign * heap[0]) != level:
                heappop(heap)
                self._num_entries -= 1
            if not heap:
                del self._heaps[level]
                continue
            signed = heap[0]
            rank = (sign * self._key(level, jobs[sign * signed].arrival_s), signed)
            if best is None or rank < best:
                best = rank
        return None if best is None else jobs[sign * best[1]]

    def _sweep(self) -> None:
        self._heaps.clear()
        for number, level in self._members.items():
            self._heaps.setdefault(level, []).append(self._sign * number)
        for heap in self._heaps.values():
            heapify(heap)
        self._num_entries = len(self._members)
