"""What a head has yet to read: hidden states of the target, by sequence, until somebody wants a guess."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Seen

MAX_WAITING_BYTES = 128 << 20  # of all sequences; whoever has most of it starts anew when it is full


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
    def length(self) -> int:
        """Rows that were read or wait."""
        return self.num_read + self.num_waiting

    @property
    def end(self) -> int:
        """The first token whose hidden states were not seen."""
        return self.first + self.length

    def add(self, rows: torch.Tensor) -> None:
        self.waiting.append(rows)
        self.num_waiting += len(rows)

    def gather(self) -> None:
        """Into memory of its own."""
        if self.waiting:
            self.waiting = [torch.cat(self.waiting)]

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
    """A sequence begins with the first row that is seen of it: what was found in a cache was not computed.

    Rows are copied once for all sequences of a step, so what is read of them keeps others in memory: they are
    taken apart when there may be twice as many as wait.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._progress: dict[int, Progress] = {}
        self._num_copied = 0  # rows, since they were taken apart last

    def of(self, seq_id: int) -> Progress | None:
        return self._progress.get(seq_id)

    def release(self, seq_id: int) -> None:
        self._progress.pop(seq_id, None)

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """Keep the rows that are new: those of committed tokens, and of the drafts that stand."""
        found = [(self._begun(one), one) for one in seen]
        pieces = [(progress, one, rows) for progress, one in found for rows in _new_rows(progress, one)]
        if not pieces:
            return
        taps = range(len(seen[0].features))
        copied = torch.cat(
            [torch.cat([one.features[tap][rows] for _, one, rows in pieces]) for tap in taps], dim=-1
        )
        counts = [rows.stop - rows.start for _, _, rows in pieces]
        for (progress, _, _), part in zip(pieces, torch.split(copied, counts), strict=True):
            progress.add(part)
        self._num_copied += len(copied)
        self._bound()

    def _begun(self, one: Seen) -> Progress:
        seq_id = one.sequence.seq_id
        progress = self._progress.get(seq_id)
        if progress is None or progress.end < one.start:
            progress = self._progress[seq_id] = Progress(one.start)
        return progress

    def _bound(self) -> None:
        num_waiting = sum(progress.num_waiting for progress in self._progress.values())
        while num_waiting > self.max_rows:
            seq_id, most = max(self._progress.items(), key=lambda entry: entry[1].num_waiting)
            self._progress[seq_id] = Progress(most.end)
            num_waiting -= most.num_waiting
        if self._num_copied > 2 * self.max_rows:
            for progress in self._progress.values():
                progress.gather()
            self._num_copied = num_waiting


def _new_rows(progress: Progress, one: Seen) -> list[slice]:
    """Rows of the step, in the order of their tokens."""
    num_committed = min(len(one.tokens), len(one.sequence.tokens) - one.start)
    known = progress.end - one.start
    found = [slice(known, num_committed)] if known < num_committed else []
    standing = [num_committed + draft for draft in one.kept[max(0, known - num_committed) :]]
    return [*found, *(slice(row, row + 1) for row in standing)]
