"""The page tables of sequences: finding, growing, publishing and letting go of pages.

The only place that changes `Sequence.pages` and `Sequence.page_keys`, and the only client of the
pool. A table lists blocks, each of them one page of every group of layers (`scheduler/spans.py`), so entry
`block * num_groups + group`; nearly all models have one group. Of a running sequence's slots:

    0 ........ num_findable ........ num_computed ........ num_tokens ...... blocks * page_size
    | full pages have a key | KV valid, but private | to be computed | at most one page's rest
"""

from __future__ import annotations

from itertools import chain, takewhile
from typing import TYPE_CHECKING

from scheduler.prefix import group_key, page_key
from scheduler.spans import NO_PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from scheduler.pages import PagePool
    from scheduler.spans import Spans
    from scheduler.tiers import Tiers
    from scheduler.types import Sequence


class PageTables:
    def __init__(self, pool: PagePool, tiers: Tiers, spans: Spans) -> None:
        self.pool = pool
        self.tiers = tiers
        self.spans = spans
        self.num_groups = spans.num_groups
        self.page_size = spans.page_size

    # Finding

    def find(self, sequence: Sequence) -> list[int]:
        """A table of findable pages that may stand for the sequence's leading tokens, as many as can be;
        NO_PAGE where the token after them sees nothing.

        The last committed token is always computed, for its logits. Who reports the log-probabilities
        of its prompt must compute it once itself: until then nothing is found, and after a
        preemption only what it had reported already.
        """
        page_of, keys = self.pool.page_of, sequence.page_keys
        num_blocks = self.reach(sequence, page_of.__contains__)
        if not self.spans.slide:
            return [page_of[key] for key in keys[: num_blocks * self.num_groups]]
        table = [NO_PAGE] * (num_blocks * self.num_groups)
        for entry in self._seen_after(num_blocks):
            table[entry] = page_of[keys[entry]]
        return table

    def find_below(self, sequence: Sequence) -> tuple[int, list[bytes]]:
        """How many leading blocks can be had when a lower tier brings pages, and the keys of those pages
        that it has to bring."""
        page_of, below = self.pool.page_of, self.tiers.has
        num_blocks = self.reach(sequence, lambda key: key in page_of or below(key))
        keys = sequence.page_keys
        wanted = [keys[entry] for entry in self._seen_after(num_blocks)]
        return num_blocks, [key for key in wanted if key not in page_of]

    def reach(
        self, sequence: Sequence, is_there: Callable[[bytes], bool], num_blocks: int | None = None
    ) -> int:
        """The most leading blocks (of `num_blocks`, else of all that may be found instead of computed)
        after which the next token sees only pages whose keys are there."""
        spans = self.spans
        reach = self.num_shareable(sequence) if num_blocks is None else num_blocks
        for group in range(spans.num_whole):
            reach = sum(1 for _ in takewhile(is_there, self._keys(sequence, group, reach)))
        if not spans.slide:
            return reach
        # From the end on: where a page is missing, nothing that sees it can be had, so try below it.
        number, farthest = reach, max(spans.behind)
        while number > reach - farthest and number > 0:
            number -= 1
            first = number * self.num_groups + spans.num_whole
            for group, behind in enumerate(spans.behind, first):
                if number >= reach - behind and not is_there(self.key(sequence, group)):
                    reach = number
                    break
        return reach

    def num_shareable(self, sequence: Sequence) -> int:
        """How many leading blocks may be found instead of computed."""
        limit = len(sequence.tokens) - 1
        if sequence.wants_prompt_logits:
            limit = min(limit, sequence.num_reached)
        return limit // self.page_size

    def held(self, pages: list[int]) -> list[int]:
        """A table's pages, without its holes."""
        return [page for page in pages if page != NO_PAGE] if self.spans.slide else pages

    def num_held(self, sequence: Sequence) -> int:
        """Pages that a running sequence holds."""
        pages = len(sequence.pages)
        return pages - self.spans.num_unseen(sequence.num_computed // self.page_size)

    # Growing and letting go

    def hold(self, sequence: Sequence, found: list[int]) -> None:
        """Start the sequence's table with pages from `find`."""
        assert not sequence.pages, "the table is not empty"
        for page in self.held(found):
            self.pool.hold(page)
        sequence.pages = found
        sequence.num_computed = sequence.num_findable = self.num_slots(found)
        sequence.num_pages_sent = sequence.num_offered = 0

    def touch(self, sequence: Sequence, num_blocks: int) -> None:
        """Evict after all others the pages that a token after `num_blocks` sees, those that are there."""
        keys, page_of = sequence.page_keys, self.pool.page_of
        there = [keys[entry] for entry in self._seen_after(num_blocks) if keys[entry] in page_of]
        self.pool.touch([page_of[key] for key in there])

    def num_slots(self, pages: list[int]) -> int:
        return len(pages) // self.num_groups * self.page_size

    def missing(self, sequence: Sequence, num_slots: int) -> int:
        """Pages that the sequence lacks for its first `num_slots` slots."""
        return max(0, -(-num_slots // self.page_size) * self.num_groups - len(sequence.pages))

    def grow(self, sequence: Sequence, num_slots: int) -> None:
        sequence.pages += self.pool.take(self.missing(sequence, num_slots))

    def publish(self, sequence: Sequence, since: int) -> None:
        """Give keys to the pages that became full of findable tokens since there were `since`."""
        first, end = since // self.page_size, sequence.num_findable // self.page_size
        if first == end:
            return  # as after nearly every output token
        for entry in range(first * self.num_groups, end * self.num_groups):
            self.pool.register(sequence.pages[entry], self.key(sequence, entry))

    def slide(self, sequence: Sequence, since: int) -> None:
        """Let go of the pages that nobody of the sequence sees any more, as it has computed more than the
        first `since` tokens.

        Of a prompt they stay findable until their memory is needed: another prompt may go on from there.
        Of output they are free at once, if nobody else holds them: whoever goes on with it needs its end.
        """
        first, end = since // self.page_size, sequence.num_computed // self.page_size
        if first == end:
            return
        num_prompt_blocks = sequence.prompt_len // self.page_size
        references = self.pool.references
        for group, behind in enumerate(self.spans.behind, self.spans.num_whole):
            for number in range(max(0, first - behind), end - behind):
                entry = number * self.num_groups + group
                page, sequence.pages[entry] = sequence.pages[entry], NO_PAGE
                if number >= num_prompt_blocks and references[page] == 1:
                    self.pool.forget(page)
                self.pool.release([page])

    def trim(self, sequence: Sequence) -> None:
        """Give back the pages beyond what the sequence wants computed next."""
        keep = -(-sequence.num_tokens // self.page_size) * self.num_groups
        if len(sequence.pages) > keep:
            self.pool.release(sequence.pages[keep:])
            del sequence.pages[keep:]
            sequence.num_pages_sent = min(sequence.num_pages_sent, keep)

    def forget(self, sequence: Sequence) -> None:
        """Its numbers went wrong: what it alone computed is offered to nobody any more, in no tier; nor is
        what it let go of behind a window, unless somebody else holds it now."""
        num_full = sequence.num_findable // self.page_size * self.num_groups
        for entry, page in enumerate(sequence.pages):
            if page != NO_PAGE:
                self._forget(page, self.pool.key_of.get(page), num_own=1)
            elif entry < num_full:
                key = self.key(sequence, entry)
                self._forget(self.pool.find(key), key, num_own=0)

    def _forget(self, page: int | None, key: bytes | None, num_own: int) -> None:
        """Unless somebody holds the page beside copies in flight and the sequence itself (`num_own`)."""
        if page is not None:
            if self.pool.references[page] - self.tiers.num_reading(page) > num_own:
                return
            self.pool.forget(page)
        if key is not None and self.tiers.enabled:
            self.tiers.forget(key)

    def drop(self, sequence: Sequence) -> None:
        """Let go of every page; the full ones stay findable until their memory is needed."""
        self.pool.release(self.held(sequence.pages))
        sequence.pages = []
        sequence.num_computed = sequence.num_findable = sequence.num_pages_sent = 0

    # Keys

    def key(self, sequence: Sequence, entry: int) -> bytes:
        """The key of a full page of committed tokens, which never change: computed once, and kept over
        preemptions."""
        keys, size = sequence.page_keys, self.page_size
        while len(keys) <= entry:
            start = len(keys) // self.num_groups * size
            parent = keys[-self.num_groups] if keys else sequence.root_key
            key = page_key(parent, sequence.tokens[start : start + size])
            keys.append(key)
            keys.extend(group_key(key, group) for group in range(1, self.num_groups))
        return keys[entry]

    def _keys(self, sequence: Sequence, group: int, num_blocks: int) -> Iterator[bytes]:
        """Those of a group's leading pages; a new one is only made when it is asked for."""
        end = num_blocks * self.num_groups
        known = sequence.page_keys[group : end : self.num_groups]
        new = range(group + len(known) * self.num_groups, end, self.num_groups)
        return chain(known, (self.key(sequence, entry) for entry in new))

    def _seen_after(self, num_blocks: int) -> Iterable[int]:
        """Entries of the first `num_blocks` that a token after them sees something of."""
        spans = self.spans
        if not spans.slide:
            return range(num_blocks * self.num_groups)
        first_seen = (0,) * spans.num_whole + tuple(num_blocks - behind for behind in spans.behind)
        seen = [
            range(max(0, first) * self.num_groups + group, num_blocks * self.num_groups, self.num_groups)
            for group, first in enumerate(first_seen)
        ]  # a long text has far more entries than are seen
        return sorted(chain.from_iterable(seen))
