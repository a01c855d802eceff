"""What crosses between deciding and computing: a plan goes out, advances come back.

Everything here is a frozen value. `Scheduler.plan()` touches no device; `Scheduler.apply()` takes
what the engine made of the plan.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from scheduler.types import EMPTY_WINDOW, FinishReason, Visibility, Window

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf


class Slice(NamedTuple):
    """The tokens of one sequence that one step computes.

    Slot k of the sequence lives in block `k // page_size` of its page table, where every group of layers
    has a page: entry `block * num_groups + group`. The slice fills slots `start .. start + len(tokens)`; its
    last `num_window` tokens are the sequence's window (all of it, or none). `new_pages` extends the page
    table from entry `first_new_page` on; `first_new_page == 0` means a fresh table (first admission, or
    resumption after a preemption). Entries of groups with a span that no token from `start` on sees are
    void: they were let go of, or never had a page (NO_PAGE).
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


class Tier(enum.IntEnum):
    """Where KV pages lie. Only pages on the device are computed with."""

    DEVICE = 0
    HOST = 1
    DISK = 2


@dataclass(frozen=True, slots=True)
class Copy:
    """The KV of one page, from a page of one tier to a page of another. The engine starts it with the
    step and reports its end in a `Copied`; until then neither page is used for anything else, and
    nobody reads the target. Ways there are: device to host, host to device, host to disk, disk to device.
    """

    number: int  # unique among copies
    key: bytes  # the content's key; a disk page carries it
    source: Tier
    source_page: int
    target: Tier
    target_page: int


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy has ended. Not `ok`: it failed, or the source was damaged; the content is a miss."""

    number: int
    ok: bool = True


@dataclass(frozen=True, slots=True)
class SharedPages:
    """Sequences of one step whose first `num_pages` pages of group 0, whose layers see everything, are the
    same ones, all computed before: their attention over those may be computed together."""

    num_pages: int
    seq_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preempted:
    """A sequence that lost its place and its pages since the last plan, and why."""

    seq_id: int
    reason: str  # "place" or "pages": what was short
    for_seq_id: int  # who needed it


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `copies` begin with it; none of its slices reads what they write."""

    step: int
    slices: tuple[Slice, ...]
    preempted: tuple[Preempted, ...] = ()
    copies: tuple[Copy, ...] = ()
    shared: tuple[SharedPages, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.slices)


class Advance(NamedTuple):
    """What a decoding method made of one slice.

    `committed` are 0..n newly committed tokens; of the slice's slots the first `num_valid` hold KV
    that stays valid (at least the committed tokens of the slice, plus the accepted part of its
    window); `window` is what the sequence wants computed next beyond its committed tokens. `error`
    ends the sequence alone: its pages of this step are not offered to anyone. `spoiled`: guesses in the
    window have spoiled the slice: nothing of it counts, and it is computed again without any.
    """

    seq_id: int
    committed: tuple[int, ...]
    num_valid: int
    window: Window = EMPTY_WINDOW
    error: str | None = None
    spoiled: bool = False


class Progress(NamedTuple):
    """What became of one sequence: tokens to deliver (stop conditions applied), and its end if it ended."""

    seq_id: int
    request_id: str
    index: int  # type: ignore[assignment]  # of the choice; nobody searches in this tuple
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    num_cached: int = 0
    first_scheduled_s: float | None = None


@dataclass(frozen=True, slots=True)
class LevelStats:
    """One level of the queue: gauges of now, and counters since the start."""

    level: int
    num_waiting: int = 0
    num_running: int = 0
    num_entered: int = 0  # sequences that joined here
    num_demoted: int = 0  # sank from here
    num_promoted: int = 0  # rose from here
    num_preempted: int = 0  # were put aside while here
    num_seated: int = 0
    waited_s: float = 0.0  # by those seated, since they came into the queue last


@dataclass(frozen=True, slots=True)
class TierStats:
    """Host or disk pages: gauges of now, and counters since the start."""

    tier: Tier
    num_pages: int
    num_used: int  # hold content that can be found
    num_busy: int  # at an end of a copy in flight
    num_in: int  # pages that arrived


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Gauges of now and counters since the start, for metrics and the log."""

    num_running: int = 0
    num_waiting: int = 0
    num_parked: int = 0  # of those waiting: until pages are computed by another, or fetched
    num_pages: int = 0
    num_pages_held: int = 0  # referenced by a sequence or a copy
    num_pages_cached: int = 0  # unreferenced, still findable by content
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_preempted_for_places: int = 0
    num_preempted_for_pages: int = 0
    num_resumed_kept: int = 0  # preempted sequences that found all they had computed on the device,
    num_resumed_fetched: int = 0  # .. had some of it fetched from a lower tier,
    num_resumed_recomputed: int = 0  # .. had some of it computed again
    recomputed_tokens: int = 0
    num_pages_up: int = 0  # fetched from lower tiers
    num_overdue: int = 0  # sequences that were put aside for too long, since the start
    longest_pause_s: float = 0.0  # of a started sequence, since the start
    backlog_s: float = 0.0  # service that the accepted sequences are expected to need still
    head_start_gamma: float = 0.0  # 0 where the policy has none
    levels: tuple[LevelStats, ...] = ()
    tiers: tuple[TierStats, ...] = ()

    @property
    def num_preemptions(self) -> int:
        return self.num_preempted_for_places + self.num_preempted_for_pages
