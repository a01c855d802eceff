"""Which hidden states a drafter reads with one guess: those that waited, of the sequences that have room.

How many rows are read is bounded, and who lacks least comes first: a long prompt is read over several guesses
and delays nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    import torch

    from engine.drafting.draft_kv import DraftKV
    from engine.drafting.guess import Want
    from engine.drafting.heads.waiting_features import Progress, WaitingFeatures

CATCH_UP_ROWS = 2048  # are read with one guess at most, over all sequences
LONG = 128  # who reads more gets its drafts with the next guess: then all guesses take about as long


@dataclass(frozen=True, slots=True)
class Reader:
    """A sequence that has read or now reads something. `rows` [n, taps * hidden] are to be read now and count
    as read already; they begin with row `start`."""

    want: Want
    progress: Progress
    start: int
    rows: torch.Tensor | None

    @property
    def seq_id(self) -> int:
        return self.want.sequence.seq_id

    @property
    def count(self) -> int:
        return len(self.rows) if self.rows is not None else 0

    @property
    def catches_up(self) -> bool:
        return not self.progress.num_waiting and self.count <= LONG


def readers(wants: SequenceOf[Want], waiting: WaitingFeatures, kv: DraftKV, num_drafted: int) -> list[Reader]:
    """Those who may have drafts now or later, with room in the KV for all that waits and `num_drafted` slots
    behind it. Who has lost its KV begins anew with what waits."""
    able = []
    for want in wants:
        progress = waiting.of(want.sequence.seq_id)
        if want.limit > 0 and progress is not None and progress.end == len(want.sequence.tokens) - 1:
            able.append((want, progress))
    able.sort(key=lambda entry: entry[1].num_waiting)
    roomy = kv.reserve((want.sequence.seq_id, progress.length + num_drafted) for want, progress in able)
    found = []
    left = CATCH_UP_ROWS
    for want, progress in able:
        if kv.length(want.sequence.seq_id) < progress.num_read:
            progress.start_anew()
        if want.sequence.seq_id in roomy and progress.length:
            start, count = progress.num_read, min(progress.num_waiting, left)
            left -= count
            found.append(Reader(want, progress, start, progress.take(count) if count else None))
    return found
