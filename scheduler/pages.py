"""The pool of KV pages: who holds each one, and which content can be found in it.

A page is in exactly one of three places:

    held    referenced by one sequence or more; may be findable by a key
    cached  referenced by nobody, findable by its key; least recently used first
    free    referenced by nobody, content unknown

`available` = free + cached: what can be handed out without taking it from anyone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class PagePool:
    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.references = [0] * num_pages
        self.free = list(range(num_pages - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.page_of: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        return len(self.free) + len(self.cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - len(self.free) - len(self.cached)

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages, each with one reference; the caller has checked `available`.

        Pages of unknown content go first, then cached ones, least recently used first.
        """
        assert count <= self.available, "more pages taken than there are"
        pages = [self.free.pop() if self.free else self._evict() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def hold(self, page: int) -> None:
        """Add a reference to a page that was found by its key."""
        if self.references[page] == 0:
            del self.cached[page]
        self.references[page] += 1

    def touch(self, pages: Sequence[int]) -> None:
        """Evict the cached ones among these after all others."""
        for page in reversed(pages):
            if page in self.cached:
                self.cached.move_to_end(page)

    def release(self, pages: Sequence[int], *, first_out: bool = False) -> None:
        """Drop one reference to each page of a chain, given from the root on.

        The chain is let go from its end, so that its deeper pages are evicted before the parents
        without which they could not be found. `first_out`: evict them before all others.
        """
        for page in reversed(pages):
            assert self.references[page] > 0, "a page released more often than held"
            self.references[page] -= 1
            if self.references[page] == 0:
                if page in self.key_of:
                    self.cached[page] = None
                    if first_out:
                        self.cached.move_to_end(page, last=False)
                else:
                    self.free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """Make the content of a held page findable.

        If two sequences computed the same content at once, the first page keeps the key; the second
        stays private to its holder and becomes free with it. Swapping would move a page under a
        table that the engine already has.
        """
        assert self.references[page] > 0, "only a held page can be registered"
        if key not in self.page_of:
            assert page not in self.key_of, "a page holds one content"
            self.page_of[key] = page
            self.key_of[page] = key

    def forget(self, page: int) -> None:
        """Make the content of a held or cached page unfindable, whether it was findable or not."""
        key = self.key_of.pop(page, None)
        if key is not None:
            del self.page_of[key]
        if page in self.cached:
            del self.cached[page]
            self.free.append(page)

    def find(self, key: bytes) -> int | None:
        return self.page_of.get(key)

    def _evict(self) -> int:
        page, _ = self.cached.popitem(last=False)
        del self.page_of[self.key_of.pop(page)]
        return page
