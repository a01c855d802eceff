"""The page tables of sequences: finding, growing, publishing and letting go of pages.

The only place that changes `Sequence.pages` and `Sequence.page_keys`, and the only client of the
pool. Of a running sequence's slots:

    0 ........ num_findable ........ num_computed ........ num_tokens ...... pages * page_size
    | full pages have a key | KV valid, but private | to be computed | at most one page's rest
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.prefix import page_key

if TYPE_CHECKING:
    from scheduler.pages import PagePool
    from scheduler.tiers import Tiers
    from scheduler.types import Sequence


class PageTables:
    def __init__(self, pool: PagePool, tiers: Tiers, page_size: int) -> None:
        self.pool = pool
        self.tiers = tiers
        self.page_size = page_size

    def pages_for(self, num_slots: int) -> int:
        return -(-num_slots // self.page_size)

    def find(self, sequence: Sequence) -> list[int]:
        """The longest chain of findable pages that may stand for the sequence's leading tokens.

        The last committed token is always computed, for its logits. Who reports the log-probabilities
        of its prompt must compute it once itself: until then nothing is found, and after a
        preemption only what it had reported already.
        """
        pages: list[int] = []
        for number in range(self.num_shareable(sequence)):
            page = self.pool.find(self.key(sequence, number))
            if page is None:
                break
            pages.append(page)
        return pages

    def find_below(self, sequence: Sequence, num_found: int) -> list[bytes]:
        """The keys of the pages after those found on the device that a lower tier can bring."""
        numbers = range(num_found, self.num_shareable(sequence))
        return self.tiers.chain(self.key(sequence, number) for number in numbers)

    def num_shareable(self, sequence: Sequence) -> int:
        """How many leading pages may be found instead of computed."""
        limit = len(sequence.tokens) - 1
        if sequence.wants_prompt_logits:
            limit = min(limit, sequence.num_reached)
        return limit // self.page_size

    def hold(self, sequence: Sequence, found: list[int]) -> None:
        """Start the sequence's table with pages from `find`."""
        assert not sequence.pages, "the table is not empty"
        for page in found:
            self.pool.hold(page)
        sequence.pages = found
        sequence.num_computed = sequence.num_findable = len(found) * self.page_size
        sequence.num_pages_sent = sequence.num_offered = 0

    def missing(self, sequence: Sequence, num_slots: int) -> int:
        """Pages that the sequence lacks for its first `num_slots` slots."""
        return max(0, self.pages_for(num_slots) - len(sequence.pages))

    def grow(self, sequence: Sequence, num_slots: int) -> None:
        sequence.pages += self.pool.take(self.missing(sequence, num_slots))

    def publish(self, sequence: Sequence, since: int) -> None:
        """Give keys to the pages that became full of findable tokens since there were `since`."""
        for number in range(since // self.page_size, sequence.num_findable // self.page_size):
            self.pool.register(sequence.pages[number], self.key(sequence, number))

    def trim(self, sequence: Sequence) -> None:
        """Give back the pages beyond what the sequence wants computed next."""
        keep = self.pages_for(sequence.num_tokens)
        if len(sequence.pages) > keep:
            self.pool.release(sequence.pages[keep:])
            del sequence.pages[keep:]
            sequence.num_pages_sent = min(sequence.num_pages_sent, keep)

    def forget(self, sequence: Sequence) -> None:
        """Its numbers went wrong: what it alone computed is offered to nobody any more."""
        for page in sequence.pages:
            if self.pool.references[page] - self.tiers.num_reading(page) == 1:
                key = self.pool.key_of.get(page)
                self.pool.forget(page)
                if key is not None and self.tiers.enabled:
                    self.tiers.forget(key)

    def drop(self, sequence: Sequence) -> None:
        """Let go of every page; the full ones stay findable until their memory is needed."""
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = sequence.num_findable = sequence.num_pages_sent = 0

    def key(self, sequence: Sequence, number: int) -> bytes:
        """The key of one full page of committed tokens, which never change: computed once, and kept
        over preemptions."""
        keys, size = sequence.page_keys, self.page_size
        while len(keys) <= number:
            start = len(keys) * size
            parent = keys[-1] if keys else sequence.root_key
            keys.append(page_key(parent, sequence.tokens[start : start + size]))
        return keys[number]
