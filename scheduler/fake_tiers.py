"""A stand-in for the engine's copies between tiers: slow, in any order, and sometimes failing.

A copy reads its source and writes its target at some time between its start and its end; here at a random
one of the two, and the target holds rubbish meanwhile. So content that is overwritten while it is
read, or read before it is there, is noticed by the runner, which knows what every slot must hold.
A page of the disk that could not be read is damaged until it is written again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.plan import Copied, Copy, Tier

if TYPE_CHECKING:
    import random

RUBBISH = -1

Content = list[int]  # of one page's slots


class FakeTiers:
    """Owns what the pages of all tiers hold. `failing`: the share of copies that fail."""

    def __init__(
        self, rng: random.Random, num_pages: int, page_size: int, failing: float, slowness: float
    ) -> None:
        self.pages: dict[tuple[Tier, int], Content] = {
            (Tier.DEVICE, page): [RUBBISH] * page_size for page in range(num_pages)
        }
        self._page_size = page_size
        self._rng = rng
        self._failing = failing
        self._slowness = slowness
        self._under_way: list[tuple[Copy, Content | None]] = []
        self.damaged: set[int] = set()  # pages of the disk

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def start(self, copies: tuple[Copy, ...]) -> None:
        for copy in copies:
            if copy.target is Tier.DISK:
                self.damaged.discard(copy.target_page)
            content = self._read(copy) if self._rng.random() < 0.5 else None
            self.pages[copy.target, copy.target_page] = [RUBBISH] * self._page_size
            self._under_way.append((copy, content))

    def finished(self) -> list[Copied]:
        """Some of those under way, in any order."""
        self._rng.shuffle(self._under_way)
        ended = []
        while self._under_way and self._rng.random() >= self._slowness:
            copy, content = self._under_way.pop()
            ok = self._rng.random() >= self._failing
            if ok:
                self.pages[copy.target, copy.target_page] = self._read(copy) if content is None else content
            elif copy.source is Tier.DISK:
                self.damaged.add(copy.source_page)
            ended.append(Copied(copy.number, ok))
        return ended

    def disk(self) -> dict[tuple[Tier, int], Content]:
        """What survives the process."""
        return {place: content for place, content in self.pages.items() if place[0] is Tier.DISK}

    def _read(self, copy: Copy) -> Content:
        return list(self.pages[copy.source, copy.source_page])
