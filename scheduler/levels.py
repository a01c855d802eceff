"""What happened at each level of the queue: counters for metrics, nothing that decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

from scheduler.plan import LevelStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.types import Sequence

MAX_LEVELS = 64  # told apart; once there are so many, another counts with the nearest of them


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
        self._counts: dict[int, _Counts] = {}

    def entered(self, level: int) -> None:
        self._of(level).entered += 1

    def moved(self, before: int, after: int) -> None:
        if after > before:
            self._of(before).demoted += 1
        elif after < before:
            self._of(before).promoted += 1

    def preempted(self, level: int) -> None:
        self._of(level).preempted += 1

    def seated(self, level: int, waited_s: float) -> None:
        counts = self._of(level)
        counts.seated += 1
        counts.waited_s += waited_s

    def stats(
        self, waiting: Iterable[tuple[int, int]], running: Iterable[Sequence]
    ) -> tuple[LevelStats, ...]:
        """`waiting`: (level, number of sequences)."""
        num_waiting = self._by_known(waiting)
        num_running = self._by_known(Counter(sequence.level for sequence in running).items())
        return tuple(
            LevelStats(
                level,
                num_waiting[level],
                num_running[level],
                counts.entered,
                counts.demoted,
                counts.promoted,
                counts.preempted,
                counts.seated,
                counts.waited_s,
            )
            for level, counts in sorted(self._counts.items(), key=itemgetter(0))
        )

    def _by_known(self, numbers: Iterable[tuple[int, int]]) -> Counter[int]:
        by_known: Counter[int] = Counter()
        for level, number in numbers:
            by_known[self._known(level)] += number
        return by_known

    def _of(self, level: int) -> _Counts:
        return self._counts[self._known(level)]

    def _known(self, level: int) -> int:
        """The level under which one is counted: the same for ever, or counters would fall."""
        if level not in self._counts:
            if len(self._counts) == MAX_LEVELS:
                return min(self._counts, key=lambda known: abs(known - level))
            self._counts[level] = _Counts()
        return level
