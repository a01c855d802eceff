"""What a head has yet to read: hidden states of the target, by sequence, until somebody wants a guess."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Seen

MAX_WAITING_BYTES = 256 << 20  # of all sequences; whoever has most of it starts anew when it is full


@dataclass(slots=True)
class Progress:
    """A sequence's rows, one for each of its tokens from `first` on: `num_read` were read by the head, those
    in `waiting` were not. Row k is of the hidden states of token `first + k` and of the token behind it."""

    first: int
    num_read: int = 0
    feature: torch.Tensor | None = None  # [hidden]: what the head made of the last row that it read
    waiting: list[torch.Tensor] = field(default_factory=list)  # [n, taps * hidden] each, in order
    num_waiting: int = 0

    @property
    def end(self) -> int:
        """The first token whose hidden states were not seen."""
        return self.first + self.num_read + self.num_waiting

    def add(self, rows: torch.Tensor) -> None:
        self.waiting.append(rows)
        self.num_waiting += len(rows)

    def take(self, count: int) -> torch.Tensor:
        """The first `count` that wait, which are read now."""
        rows = torch.cat(self.waiting) if len(self.waiting) > 1 else self.waiting[0]
        self.waiting = [rows[count:]] if count < len(rows) else []
        self.num_waiting -= count
        self.num_read += count
        return rows[:count]

    def start_anew(self) -> None:
        """What was read is lost: what waits is the beginning now."""
        self.first += self.num_read
        self.num_read = 0
        self.feature = None


class WaitingFeatures:
    """A sequence begins with the first row that is seen of it: what was found in a cache was not computed."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._progress: dict[int, Progress] = {}

    def of(self, seq_id: int) -> Progress | None:
        return self._progress.get(seq_id)

    def release(self, seq_id: int) -> None:
        self._progress.pop(seq_id, None)

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """Keep the rows that are new: those of committed tokens, and of the drafts that stand."""
        for one in seen:
            self._observe(one)
        while sum(progress.num_waiting for progress in self._progress.values()) > self.max_rows:
            seq_id, most = max(self._progress.items(), key=lambda entry: entry[1].num_waiting)
            self._progress[seq_id] = Progress(most.end)

    def _observe(self, one: Seen) -> None:
        seq_id = one.sequence.seq_id
        progress = self._progress.get(seq_id)
        if progress is None or progress.end < one.start:
            progress = self._progress[seq_id] = Progress(one.start)
        num_committed = min(len(one.tokens), len(one.sequence.tokens) - one.start)
        known = progress.end - one.start
        if not one.kept:
            if known < num_committed:
                progress.add(torch.cat([tap[known:num_committed] for tap in one.features], dim=-1))
        else:
            rows = [*range(num_committed), *(num_committed + draft for draft in one.kept)][known:]
            if rows:
                progress.add(torch.cat([tap[rows] for tap in one.features], dim=-1))
