"""The scheduler's state as GET /debug/scheduler shows it: names and numbers, never text of a request."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from scheduler.costs import CostModel
from scheduler.plan import SchedulerStats
from scheduler.snapshot import SequenceView, TenantView
from server.logs import sanitise

if TYPE_CHECKING:
    from scheduler.snapshot import Snapshot


class SchedulerState(msgspec.Struct, kw_only=True):
    """`stats.tiers` names tiers by number: 0 device, 1 host, 2 disk."""

    policy: str
    num_steps: int
    num_copies_in_flight: int
    stats: SchedulerStats
    costs: CostModel
    sequences: tuple[SequenceView, ...]
    tenants: tuple[TenantView, ...]


def state_of(snapshot: Snapshot, costs: CostModel) -> SchedulerState:
    """Tenants that clients have named are shown in printable characters, and cut."""
    return SchedulerState(
        policy=snapshot.policy,
        num_steps=snapshot.num_steps,
        num_copies_in_flight=snapshot.num_copies_in_flight,
        stats=snapshot.stats,
        costs=costs,
        sequences=tuple(replace(piece, tenant=sanitise(piece.tenant)) for piece in snapshot.sequences),
        tenants=tuple(replace(piece, tenant=sanitise(piece.tenant)) for piece in snapshot.tenants),
    )
