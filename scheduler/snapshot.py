"""The scheduler's state for people who look: who is where and why, at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from scheduler.plan import SchedulerStats  # noqa: TC001 (msgspec reads the annotations)
from scheduler.types import SequenceState

if TYPE_CHECKING:
    from scheduler.scheduler import Scheduler
    from scheduler.types import Sequence


MAX_SEQUENCES = 1000  # described at a time: all others wait for the next step meanwhile


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One live sequence. `head_start_s` is None where the order knows none."""

    request_id: str
    index: int
    tenant: str
    state: SequenceState
    level: int
    head_start_s: float | None
    is_overdue: bool
    age_s: float
    waiting_s: float  # since it came into the queue last; 0 while it runs
    num_tokens: int
    num_computed: int
    num_output: int
    num_pages: int
    num_preemptions: int
    attained_s: float


@dataclass(frozen=True, slots=True)
class TenantView:
    tenant: str
    weight: float
    served_s: float  # the virtual counter: attributed service divided by the weight
    num_live: int
    num_running: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`sequences` and `tenants` may be cut; the counts in `stats` are whole."""

    policy: str
    stats: SchedulerStats
    sequences: tuple[SequenceView, ...]
    tenants: tuple[TenantView, ...]
    num_copies_in_flight: int
    num_steps: int


def take_snapshot(scheduler: Scheduler, max_sequences: int) -> Snapshot:
    """Of at most `max_sequences` (and `MAX_SEQUENCES`), those that run first, and of as many tenants."""
    most = min(max_sequences, MAX_SEQUENCES)
    running = scheduler._places.running
    others = (one for seq_id, one in scheduler._sequences.items() if seq_id not in running)
    tenants = islice(scheduler._tenants.active.values(), most)
    now_s = scheduler._clock()
    return Snapshot(
        policy=scheduler.config.policy,
        stats=scheduler.stats(),
        sequences=tuple(
            _view(scheduler, one, now_s) for one in islice(chain(running.values(), others), most)
        ),
        tenants=tuple(
            TenantView(piece.name, piece.weight, piece.served_s, piece.num_live, piece.num_running)
            for piece in tenants
        ),
        num_copies_in_flight=len(scheduler._tiers.in_flight),
        num_steps=scheduler._num_steps,
    )


def _view(scheduler: Scheduler, sequence: Sequence, now_s: float) -> SequenceView:
    policy = scheduler._policy
    running = sequence.state is SequenceState.RUNNING
    head_start_s = None
    if policy.max_head_start_s != float("inf"):
        head_start_s = sequence.arrival_s - policy.key(sequence.level, sequence.arrival_s)
    return SequenceView(
        request_id=sequence.request.request_id,
        index=sequence.index,
        tenant=sequence.tenant,
        state=sequence.state,
        level=sequence.level,
        head_start_s=head_start_s,
        is_overdue=sequence.is_overdue,
        age_s=now_s - sequence.arrival_s,
        waiting_s=0.0 if running else now_s - sequence.waiting_since_s,
        num_tokens=len(sequence.tokens),
        num_computed=sequence.num_computed,
        num_output=sequence.num_output,
        num_pages=len(scheduler._tables.held(sequence.pages)),
        num_preemptions=sequence.num_preemptions,
        attained_s=sequence.attained_s,
    )
