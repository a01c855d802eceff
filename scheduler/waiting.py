"""The waiting queue: levels, in each level tenants, for each tenant its sequences by arrival.

    first():  the level whose earliest arrival has the smallest key
              -> of the tenants that wait there the one served least
              -> that tenant's first sequence, of any level

So within a tenant the policy's order holds strictly, and between tenants a level's turn goes to whoever
had the least service. Sequences that were put aside for too long (`overdue`) go before everyone.
A sequence of a tenant that may not run more is passed over until one of the tenant's ends.

All operations are O(levels + log sequences).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scheduler.agenda import Agenda, Order
from scheduler.tenants import LazyMinimum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scheduler.policies.base import Policy
    from scheduler.tenants import Tenant, Tenants
    from scheduler.types import Sequence

OVERDUE_LEAD_S = 1e13  # the head start of those put aside for too long: by arrival (to 0.002 s), before all


class _Level:
    """`heads` has one entry per tenant that may run: its earliest arrival."""

    def __init__(self) -> None:
        self.queues: dict[int, Agenda[Sequence]] = {}  # by tenant
        self.heads: Agenda[Agenda[Sequence]] = Agenda()
        self.least_served = LazyMinimum()
        self.num_waiting = 0

    def refresh(self, tenant: Tenant, may_run: bool) -> None:
        """Put the tenant's entry in `heads` right."""
        self.heads.discard(tenant.number)
        queue = self.queues.get(tenant.number)
        if queue is None:
            return
        first = queue.first()
        if first is None:
            del self.queues[tenant.number]
        elif may_run:
            self.heads.push((first[0][0], tenant.number), queue)
            self.least_served.push(tenant.number, tenant.served_s)


class WaitingQueue:
    def __init__(self, policy: Policy, tenants: Tenants) -> None:
        self._policy = policy
        self._tenants = tenants
        self._overdue: Agenda[Sequence] = Agenda()
        self._levels: dict[int, _Level] = {}
        self._where: dict[int, tuple[int, Sequence]] = {}  # level in which each one waits

    def __len__(self) -> int:
        return len(self._where) + len(self._overdue)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._where or seq_id in self._overdue

    def __iter__(self) -> Iterator[Sequence]:
        """All of them in no order: for checks and reports, not for the step."""
        yield from (sequence for _, sequence in self._where.values())
        yield from (sequence for _, sequence in self._overdue.entries())

    def by_level(self) -> Iterator[tuple[int, int]]:
        """Each level with the number of those who wait there; the overdue ones are not among them."""
        for number, level in self._levels.items():
            yield number, level.num_waiting

    def order(self, sequence: Sequence) -> Order:
        """Who comes first, of all that wait or run."""
        if sequence.is_overdue:
            return sequence.request.arrival_s - OVERDUE_LEAD_S, sequence.seq_id
        return self._policy.key(sequence.level, sequence.request.arrival_s), sequence.seq_id

    def push(self, sequence: Sequence) -> None:
        if sequence.is_overdue:
            self._overdue.push(self.order(sequence), sequence)
            return
        order = sequence.request.arrival_s, sequence.seq_id
        tenant = self._tenants.active[sequence.request.tenant]
        level = self._levels.setdefault(sequence.level, _Level())
        level.num_waiting += 1
        level.queues.setdefault(tenant.number, Agenda()).push(order, sequence)
        level.refresh(tenant, self._tenants.may_run(tenant))
        self._where[sequence.seq_id] = sequence.level, sequence

    def discard(self, sequence: Sequence) -> None:
        if self._overdue.discard(sequence.seq_id):
            return
        number, _ = self._where.pop(sequence.seq_id)
        tenant = self._tenants.active[sequence.request.tenant]
        level = self._levels[number]
        level.num_waiting -= 1
        level.queues[tenant.number].discard(sequence.seq_id)
        level.refresh(tenant, self._tenants.may_run(tenant))
        if not level.num_waiting:
            del self._levels[number]

    def tenant_changed(self, tenant: Tenant) -> None:
        """The tenant may run more now, or no more."""
        may_run = self._tenants.may_run(tenant)
        for level in self._levels.values():
            level.refresh(tenant, may_run)

    def first(self, *, past_overdue: bool = False) -> Sequence | None:
        """Whose turn it is, or whose it were without the overdue ones."""
        if len(self._overdue) and not past_overdue and (overdue := self._first_overdue()) is not None:
            return overdue
        level = self._first_level()
        if level is None:
            return None
        if len(level.heads) == 1:
            (number,) = (entry[0][1] for entry in level.heads.entries())
        else:
            served = level.least_served.first(
                lambda number: self._tenants.served_s(number) if number in level.heads else None
            )
            assert served is not None, "a level without tenants"
            number = served
        return self._first_of(number)

    def _first_overdue(self) -> Sequence | None:
        may_run, active = self._tenants.may_run, self._tenants.active
        first = self._overdue.first()
        if first is not None and may_run(active[first[1].request.tenant]):
            return first[1]
        fit = [entry for entry in self._overdue.entries() if may_run(active[entry[1].request.tenant])]
        return min(fit, key=lambda entry: entry[0])[1] if fit else None

    def _first_level(self) -> _Level | None:
        best, best_key = None, math.inf
        for number, level in self._levels.items():
            head = level.heads.first()
            if head is not None:
                key = self._policy.key(number, head[0][0])
                if best is None or key < best_key:
                    best, best_key = level, key
        return best

    def _first_of(self, tenant: int) -> Sequence:
        heads = [
            (self._policy.key(number, head[0][0]), head[0][1], head[1])
            for number, level in self._levels.items()
            if tenant in level.queues and (head := level.queues[tenant].first()) is not None
        ]
        return min(heads, key=lambda head: head[:2])[2]
