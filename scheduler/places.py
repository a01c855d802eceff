"""Who waits and who runs.

A live sequence is in exactly one of three places: it waits in the agenda, it runs, or its request
holds it back until the prompt that it shares is computed (scheduler.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.agenda import Agenda, Order
from scheduler.types import Sequence, SequenceState

if TYPE_CHECKING:
    from scheduler.page_tables import PageTables
    from scheduler.policies import Policy


class Places:
    def __init__(self, policy: Policy, tables: PageTables, max_num_seqs: int) -> None:
        self.policy = policy
        self.tables = tables
        self.max_num_seqs = max_num_seqs
        self.waiting: Agenda[Sequence] = Agenda()
        self.waiting_by_level = [0] * policy.num_levels
        self.running: dict[int, Sequence] = {}
        self.set_aside_ids: list[int] = []  # since the last plan
        self.num_preemptions = 0
        self.query_tokens = 0
        self.hit_tokens = 0

    @property
    def is_full(self) -> bool:
        return len(self.running) >= self.max_num_seqs

    def by_policy(self) -> list[Sequence]:
        """The running sequences, the first in the order first."""
        return sorted(self.running.values(), key=self.policy.order)

    def first_waiting(self) -> tuple[Order, Sequence] | None:
        return self.waiting.first()

    def join(self, sequence: Sequence) -> None:
        """A sequence begins to wait for its first place."""
        found = len(self.tables.find(sequence)) * self.tables.page_size
        self.policy.enter(sequence, found)
        self._wait(sequence)

    def seat(self, sequence: Sequence, found: list[int]) -> None:
        """A waiting sequence gets a place, and holds the pages found for its tokens."""
        assert not self.is_full, "more sequences than places"
        self._stop_waiting(sequence)
        self.tables.hold(sequence, found)
        sequence.state = SequenceState.RUNNING
        self.running[sequence.seq_id] = sequence
        if sequence.first_scheduled_s is None:
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_len)

    def set_aside(self, sequence: Sequence) -> None:
        """Preempt: the sequence drops its pages and waits again, where its arrival puts it."""
        del self.running[sequence.seq_id]
        self.tables.drop(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.set_aside_ids.append(sequence.seq_id)
        self._wait(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The sequence ended, wherever it was."""
        if sequence.seq_id in self.waiting:
            self._stop_waiting(sequence)
        elif self.running.pop(sequence.seq_id, None) is not None:
            self.tables.drop(sequence)
        sequence.state = SequenceState.FINISHED

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self.waiting.push(self.policy.order(sequence), sequence)
        self.waiting_by_level[sequence.level] += 1

    def _stop_waiting(self, sequence: Sequence) -> None:
        self.waiting.discard(sequence.seq_id)
        self.waiting_by_level[sequence.level] -= 1
