"""Who waits and who runs.

A live sequence is in exactly one of four places: it waits in the queue, it is parked until pages that it
needs are computed by another or fetched from a lower tier, it runs, or its request holds it back until
the prompt that it shares is computed (scheduler.py).
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from scheduler.agenda import Agenda, Order
from scheduler.levels import LevelCounts
from scheduler.plan import Preempted
from scheduler.types import EMPTY_WINDOW, Sequence, SequenceState
from scheduler.waiting import WaitingQueue

if TYPE_CHECKING:
    from scheduler.clock import Clock
    from scheduler.page_tables import PageTables
    from scheduler.policies.base import Policy
    from scheduler.tenants import Tenants

_by_order = attrgetter("order")


class Places:
    def __init__(
        self,
        policy: Policy,
        tables: PageTables,
        tenants: Tenants,
        clock: Clock,
        max_num_seqs: int,
        max_pause_s: float,
    ) -> None:
        self.policy = policy
        self.tables = tables
        self.tenants = tenants
        self.max_num_seqs = max_num_seqs
        self.waiting = WaitingQueue(policy, tenants)
        self.running: dict[int, Sequence] = {}
        self.parked: dict[int, Sequence] = {}
        self.counts = LevelCounts()
        self.preempted: list[Preempted] = []  # since the last plan
        self.num_preempted = {"place": 0, "pages": 0}
        self.num_resumed = {"kept": 0, "fetched": 0, "recomputed": 0}
        self.num_overdue = 0
        self.num_parkings = 0  # since the start
        self.longest_pause_s = 0.0
        self.query_tokens = 0
        self.hit_tokens = 0
        self._clock = clock
        self.epoch = policy.epoch  # of the orders that those who run have noted
        self._max_pause_s = max_pause_s
        self.aside: set[int] = set()  # sequences that were put aside and have no place again
        self._put_aside: Agenda[Sequence] = Agenda()  # by when they will be overdue
        self._behind: dict[int, list[tuple[int, Sequence]]] = {}  # parked behind one that computes for them

    @property
    def is_full(self) -> bool:
        return len(self.running) >= self.max_num_seqs

    def order(self, sequence: Sequence) -> Order:
        return self.waiting.order(sequence)

    def by_policy(self) -> list[Sequence]:
        """The running sequences, the first in the order first."""
        if self.epoch != self.policy.epoch:
            self.epoch = self.policy.epoch
            for piece in self.running.values():
                piece.order = self.order(piece)
        return sorted(self.running.values(), key=_by_order)

    def join(self, sequence: Sequence) -> None:
        """A sequence begins to wait for its first place."""
        sequence.num_found = self.tables.num_slots(self.tables.find(sequence))
        self.policy.enter(sequence)
        sequence.level = self.policy.level(sequence)
        self.counts.entered(sequence.level)
        sequence.waiting_since_s = self._clock()
        self._wait(sequence)

    def seat(self, sequence: Sequence, found: list[int]) -> None:
        """A waiting sequence gets a place, and holds the pages found for its tokens."""
        assert not self.is_full, "more sequences than places"
        self.waiting.discard(sequence)
        self.aside.discard(sequence.seq_id)
        self._put_aside.discard(sequence.seq_id)
        self.tables.hold(sequence, found)
        sequence.state = SequenceState.RUNNING
        self.running[sequence.seq_id] = sequence
        sequence.order = self.order(sequence)
        self._count_running(sequence, +1)
        self._note_seated(sequence)
        sequence.fetched_after = -1

    def set_aside(self, sequence: Sequence, reason: str, beneficiary: Sequence) -> None:
        """Preempt: the sequence drops its pages and waits again, where its arrival puts it."""
        pages = list(self.tables.held(sequence.pages))
        if sequence.window.optional:
            sequence.window = EMPTY_WINDOW
        self._stop_running(sequence)
        sequence.num_preemptions += 1
        self.aside.add(sequence.seq_id)
        self.num_preempted[reason] += 1
        self.counts.preempted(sequence.level)
        self.preempted.append(Preempted(sequence.seq_id, reason, beneficiary.seq_id))
        sequence.waiting_since_s = self._clock()
        self._wait(sequence)
        if not sequence.is_overdue:
            due_s = sequence.waiting_since_s + self._max_pause_s
            self._put_aside.push((due_s, sequence.seq_id), sequence)
        if self.tables.tiers.enabled:
            self.tables.tiers.put_aside(pages, self.order(sequence)[0])

    def leave(self, sequence: Sequence) -> None:
        """The sequence ended, wherever it was."""
        if sequence.state is SequenceState.RUNNING:
            self._stop_running(sequence)
        elif sequence.seq_id in self.parked:
            del self.parked[sequence.seq_id]
            self.tables.tiers.forget_sequence(sequence.seq_id)
        elif sequence.seq_id in self.waiting:
            self.waiting.discard(sequence)
        self.aside.discard(sequence.seq_id)
        self._put_aside.discard(sequence.seq_id)
        self.policy.leave(sequence)
        sequence.state = SequenceState.FINISHED

    def relevel(self, sequence: Sequence) -> None:
        """A running sequence was served: it may belong elsewhere now."""
        level = self.policy.level(sequence)
        self.counts.moved(sequence.level, level)
        sequence.level = level
        sequence.order = self.order(sequence)
        if not sequence.num_left:
            sequence.next_change = self.policy.next_change(sequence)

    def call_overdue(self) -> None:
        """Who was put aside for too long goes before all that were not, and stays there to its end."""
        now_s = self._clock()
        while (entry := self._put_aside.first()) is not None and entry[0][0] <= now_s:
            sequence = entry[1]
            self._put_aside.discard(sequence.seq_id)
            self.num_overdue += 1
            if sequence.seq_id in self.waiting:
                self.waiting.discard(sequence)
                sequence.is_overdue = True
                self.waiting.push(sequence)
                continue
            sequence.is_overdue = True
            if sequence.seq_id not in self.tables.tiers.fetches:
                self.unpark(sequence.seq_id)  # nobody else's pace counts any more

    # Parking

    def park(self, sequence: Sequence) -> None:
        """It has its turn, but its pages are on their way: others go on meanwhile."""
        self.waiting.discard(sequence)
        sequence.state = SequenceState.PARKED
        self.num_parkings += 1
        self.parked[sequence.seq_id] = sequence

    def park_behind(self, sequence: Sequence, other: Sequence, num_tokens: int) -> None:
        """Until `other`, which runs, has computed `num_tokens` leading tokens that both share."""
        self.park(sequence)
        sequence.parked_behind = other.seq_id
        self._behind.setdefault(other.seq_id, []).append((num_tokens, sequence))

    def unpark(self, seq_id: int) -> None:
        """Its pages came, or will not come: it waits for its turn again. Unknown ones are ignored."""
        sequence = self.parked.pop(seq_id, None)
        if sequence is not None:
            sequence.parked_behind = -1
            sequence.num_found = self.tables.num_slots(self.tables.find(sequence))
            level = self.policy.level(sequence)
            self.counts.moved(sequence.level, level)
            sequence.level = level
            self._wait(sequence)

    def unpark_behind(self, other: Sequence, num_computed: float) -> None:
        """`other` has computed so many leading tokens for all to find; infinity: it computes no more."""
        waiting = self._behind.pop(other.seq_id, None)
        if waiting is None:
            return
        waiting = [entry for entry in waiting if entry[1].parked_behind == other.seq_id]
        left = [entry for entry in waiting if entry[0] > num_computed]
        for num_tokens, sequence in waiting:
            if num_tokens <= num_computed:
                self.unpark(sequence.seq_id)
        if left:
            self._behind[other.seq_id] = left

    # One sequence, in and out

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self.waiting.push(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[sequence.seq_id]
        self.tables.drop(sequence)
        self._count_running(sequence, -1)
        self.unpark_behind(sequence, float("inf"))

    def _count_running(self, sequence: Sequence, change: int) -> None:
        tenant = self.tenants.active[sequence.request.tenant]
        could_run = self.tenants.may_run(tenant)
        tenant.num_running += change
        if self.tenants.may_run(tenant) != could_run:
            self.waiting.tenant_changed(tenant)

    def _note_seated(self, sequence: Sequence) -> None:
        waited_s = self._clock() - sequence.waiting_since_s
        self.counts.seated(sequence.level, waited_s)
        if sequence.first_scheduled_s is None and not sequence.num_preemptions:
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_len)
            return
        if not sequence.num_preemptions:
            return
        self.longest_pause_s = max(self.longest_pause_s, waited_s)
        full_pages = sequence.num_reached - sequence.num_reached % self.tables.page_size
        if sequence.num_computed < full_pages:
            self.num_resumed["recomputed"] += 1
        else:
            self.num_resumed["kept" if sequence.fetched_after < 0 else "fetched"] += 1
