"""What happened at each level of the queue: counters for metrics, nothing that decides."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.plan import LevelStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.types import Sequence

MAX_LEVELS = 64  # reported; a policy with more is reported in the lowest of them


@dataclass(slots=True)
class _Counts:
    entered: int = 0
    demoted: int = 0
    promoted: int = 0
    preempted: int = 0
    seated: int = 0
    waited_s: float = 0.0


class LevelCounts:
    def __init__(self) -> None:
        self._counts: dict[int, _Counts] = defaultdict(_Counts)

    def entered(self, level: int) -> None:
        self._counts[level].entered += 1

    def moved(self, before: int, after: int) -> None:
        if after > before:
            self._counts[before].demoted += 1
        elif after < before:
            self._counts[before].promoted += 1

    def preempted(self, level: int) -> None:
        self._counts[level].preempted += 1

    def seated(self, level: int, waited_s: float) -> None:
        counts = self._counts[level]
        counts.seated += 1
        counts.waited_s += waited_s

    def stats(
        self, waiting: Iterable[tuple[int, int]], running: Iterable[Sequence]
    ) -> tuple[LevelStats, ...]:
        """`waiting`: (level, number of sequences)."""
        num_waiting, num_running = dict(waiting), defaultdict[int, int](int)
        for sequence in running:
            num_running[sequence.level] += 1
        known = sorted(self._counts.keys() | num_waiting.keys() | num_running.keys())[:MAX_LEVELS]
        return tuple(
            LevelStats(
                level,
                num_waiting.get(level, 0),
                num_running.get(level, 0),
                counts.entered,
                counts.demoted,
                counts.promoted,
                counts.preempted,
                counts.seated,
                counts.waited_s,
            )
            for level in known
            for counts in (self._counts[level],)
        )
