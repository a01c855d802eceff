"""What crosses between deciding and computing: a plan goes out, advances come back.

Everything here is a frozen value. `Scheduler.plan()` touches no device; `Scheduler.apply()` takes
what the engine made of the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.types import EMPTY_WINDOW, FinishReason, Visibility, Window

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf


@dataclass(frozen=True, slots=True)
class Slice:
    """The tokens of one sequence that one step computes.

    Slot k of the sequence lives in page `k // page_size` of its page table. The slice fills slots
    `start .. start + len(tokens)`; its last `num_window` tokens are the sequence's window (all of it,
    or none). `new_pages` extends the page table from entry `first_new_page` on; `first_new_page == 0`
    means a fresh table (first admission, or resumption after a preemption).
    """

    seq_id: int
    start: int
    tokens: tuple[int, ...]
    positions: SequenceOf[int]
    first_new_page: int
    new_pages: tuple[int, ...]
    num_logits: int  # trailing tokens whose logits are wanted; 0 in the middle of a prompt
    num_window: int = 0
    visibility: Visibility = Visibility.CAUSAL  # inside the window; committed tokens are causal
    ancestors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `preempted` names sequences that lost their pages since the last plan."""

    step: int
    slices: tuple[Slice, ...]
    preempted: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.slices)


@dataclass(frozen=True, slots=True)
class Advance:
    """What a decoding method made of one slice.

    `committed` are 0..n newly committed tokens; of the slice's slots the first `num_valid` hold KV
    that stays valid (at least the committed tokens of the slice, plus the accepted part of its
    window); `window` is what the sequence wants computed next beyond its committed tokens. `error`
    ends the sequence alone: its pages of this step are not offered to anyone.
    """

    seq_id: int
    committed: tuple[int, ...]
    num_valid: int
    window: Window = EMPTY_WINDOW
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What became of one sequence: tokens to deliver (stop conditions applied), and its end if it ended."""

    seq_id: int
    request_id: str
    index: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    num_cached: int = 0
    first_scheduled_s: float | None = None


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Gauges of now and counters since the start, for metrics and the log. All counts, no times."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_pages_held: int = 0  # referenced by a sequence
    num_pages_cached: int = 0  # unreferenced, still findable by content
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    recomputed_tokens: int = 0
    running_by_level: tuple[int, ...] = ()
    waiting_by_level: tuple[int, ...] = ()
