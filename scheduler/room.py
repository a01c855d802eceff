"""How many pages there are for whom: those available, less what others are expected to need."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.config import SchedulerConfig
    from scheduler.places import Places
    from scheduler.types import Sequence


class Room:
    def __init__(self, places: Places, config: SchedulerConfig) -> None:
        self._places = places
        self._tables = places.tables
        self._pool = places.tables.pool
        self._spans = places.tables.spans
        self._config = config

    def spare(self) -> int:
        """Available pages that nobody who runs is expected to need. Admitting beyond that would end in
        preemptions and in tokens computed twice."""
        running = self._places.running.values()
        promised = self._promised_to_fetching()
        if self._spans.slide:
            promised += sum(self._due(one, self._goal(one)) for one in running)
            return self._pool.available - promised
        size = self._tables.page_size
        for piece in running:  # the same, inline: this is walked in every plan
            goal = len(piece.tokens) + len(piece.window.tokens) + size
            if goal < piece.num_expected:
                goal = piece.num_expected
            promised += -(-goal // size) - len(piece.pages)
        return self._pool.available - promised

    def spare_now(self) -> int:
        """Available pages that nobody who runs needs at once: for known tokens, and one to grow into."""
        running, size = self._places.running.values(), self._tables.page_size
        promised = self._promised_to_fetching()
        if self._spans.slide:
            promised += sum(self._due(one, one.num_tokens + size) for one in running)
            return self._pool.available - promised
        for piece in running:  # the same, inline
            slots = len(piece.tokens) + len(piece.window.tokens) + size
            promised += -(-slots // size) - len(piece.pages)
        return self._pool.available - promised

    def needed(self, sequence: Sequence, found: list[int]) -> int:
        """Available pages that seating a sequence uses up: new ones, and found ones nobody holds."""
        return self._used_up(sequence, found, self._goal(sequence))

    def needed_now(self, sequence: Sequence, found: list[int]) -> int:
        return self._used_up(sequence, found, sequence.num_tokens)

    def back(self, victim: Sequence, found: list[int]) -> int:
        """Pages that `spare_now` gains when one sequence goes, at the least: shared ones may stay."""
        references, kept = self._pool.references, set(found)
        held = self._tables.held(victim.pages)
        own = sum(1 for page in held if references[page] == 1 and page not in kept)
        return own + self._due(victim, victim.num_tokens + self._tables.page_size)

    def _goal(self, sequence: Sequence) -> int:
        """Slots that a sequence is expected to fill in the end; at least a page more than it needs now."""
        return max(sequence.num_tokens + self._tables.page_size, sequence.num_expected)

    def _due(self, running: Sequence, num_slots: int) -> int:
        """Pages that one who runs lacks on its way to `num_slots`, of those that it needs at a time."""
        most = self._most_pages(running, num_slots, running.num_computed)
        return max(0, most - self._tables.num_held(running))

    def _used_up(self, sequence: Sequence, found: list[int], num_slots: int) -> int:
        held, references = self._tables.held(found), self._pool.references
        unheld = sum(1 for page in held if references[page] == 0)
        most = self._most_pages(sequence, num_slots, self._tables.num_slots(found))
        return min(most, self._config.num_pages) - len(held) + unheld

    def _promised_to_fetching(self) -> int:
        parked = [self._places.parked[number] for number in self._tables.tiers.fetches]
        return sum(min(self._most_pages(one, self._goal(one), 0), self._config.num_pages) for one in parked)

    def _most_pages(self, sequence: Sequence, num_slots: int, num_computed: int) -> int:
        """What the sequence holds at most on its way to `num_slots`, from the first `num_computed` on."""
        num_ahead = min(sequence.num_tokens - num_computed, self._config.max_num_batched_tokens)
        return self._spans.most_pages(num_slots, num_ahead)
