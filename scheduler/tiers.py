"""Pages below the device: host memory and, under it, a disk file.

Content comes down before its memory is needed and goes up when a sequence wants to run:

    device ──(ahead of eviction)──> host ──(behind the write)──> disk
       ^──────────────(fetch)─────────┴───────────(fetch)──────────┘

A tier is a cache by content key, least recently used first. A page on its way is *busy* at both ends:
the device page is held, the other is neither free nor findable, until the engine says how the copy
ended. What a failed copy should have brought is a miss, and will be computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING

from scheduler.agenda import Agenda
from scheduler.plan import Copied, Copy, Tier, TierStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scheduler.pages import PagePool

_LOOK_AHEAD = 64  # device pages, the next to be evicted, that are considered for copying in one step
_FREE_SHARE = 4  # copies of pages that nobody put aside begin when less than 1 / _FREE_SHARE is free


class LowerTier:
    """Pages of host or disk by the key of their content."""

    def __init__(self, tier: Tier, num_pages: int, index: Mapping[bytes, int] | None = None) -> None:
        self.tier = tier
        self.num_pages = num_pages
        self.page_of: OrderedDict[bytes, int] = OrderedDict(index or {})  # least recently used first
        taken = set(self.page_of.values())
        self.free = [page for page in range(num_pages - 1, -1, -1) if page not in taken]
        self.arriving: set[bytes] = set()
        self.reading: dict[bytes, int] = {}  # content that a copy reads: not to be evicted
        self.num_in = 0  # pages that arrived, since the start

    def has(self, key: bytes) -> bool:
        return key in self.page_of

    def make_room(self) -> int | None:
        """A page to write into, or None if all content is being read or written."""
        if self.free:
            return self.free.pop()
        for key in self.page_of:
            if key not in self.reading:
                return self.page_of.pop(key)
        return None

    def begin_read(self, key: bytes) -> int:
        self.page_of.move_to_end(key)
        self.reading[key] = self.reading.get(key, 0) + 1
        return self.page_of[key]

    def end_read(self, key: bytes, ok: bool) -> None:
        self.reading[key] -= 1
        if not self.reading[key]:
            del self.reading[key]
        if not ok and key in self.page_of and key not in self.reading:
            self.free.append(self.page_of.pop(key))

    def end_write(self, key: bytes, page: int, ok: bool) -> None:
        self.arriving.discard(key)
        if ok:
            self.page_of[key] = page
            self.num_in += 1
        else:
            self.free.append(page)

    def stats(self) -> TierStats:
        return TierStats(
            tier=self.tier,
            num_pages=self.num_pages,
            num_used=len(self.page_of),
            num_busy=len(self.arriving) + len(self.reading),
            num_in=self.num_in,
        )


class Tiers:
    def __init__(
        self,
        pool: PagePool,
        host_pages: int,
        disk_pages: int,
        max_in_flight: int,
        disk_index: Mapping[bytes, int] | None = None,
    ) -> None:
        self.pool = pool
        self.host = LowerTier(Tier.HOST, host_pages)
        self.disk = LowerTier(Tier.DISK, disk_pages if host_pages else 0, disk_index if host_pages else None)
        self.in_flight: dict[int, Copy] = {}
        self.fetches: dict[int, set[bytes]] = {}  # by sequence, parked meanwhile: what it waits for
        self.num_up = 0  # pages that reached the device, since the start
        self._max_in_flight = max_in_flight
        self._new: list[Copy] = []  # for the next plan
        self._going_up: dict[bytes, int] = {}  # content on its way to the device: the page
        self._put_aside: Agenda[bytes] = Agenda()  # by device page, so as many at most; see `put_aside`
        self._unwanted: set[int] = set()  # copies in flight whose content is to be trusted no more
        self._next_number = 0

    @property
    def enabled(self) -> bool:
        return self.host.num_pages > 0

    # Up

    def has(self, key: bytes) -> bool:
        """Whether the content lies in a lower tier, or is on its way to the device."""
        return key in self._going_up or self.host.has(key) or self.disk.has(key)

    def seconds(self, keys: Iterable[bytes], host_page_s: float, disk_page_s: float) -> float:
        """How long fetching takes."""
        return sum(host_page_s if self.host.has(key) else disk_page_s for key in keys)

    def fetch(self, seq_id: int, keys: list[bytes]) -> bool:
        """Begin to bring content to the device for a sequence, as much as there is room for now."""
        waits_for = set()
        for key in keys:
            if key not in self._going_up and not self._bring_up(key):
                break
            waits_for.add(key)
        if waits_for:
            self.fetches[seq_id] = waits_for
        return bool(waits_for)

    def num_reading(self, page: int) -> int:
        """Copies in flight that hold a device page to read it."""
        copies = self.in_flight.values()
        return sum(copy.source is Tier.DEVICE and copy.source_page == page for copy in copies)

    def forget_sequence(self, seq_id: int) -> None:
        """It does not wait for its pages any more. Copies that began run to their end."""
        self.fetches.pop(seq_id, None)

    def _bring_up(self, key: bytes) -> bool:
        if len(self.in_flight) >= self._max_in_flight or not self.pool.available:
            return False
        source = self.host if self.host.has(key) else self.disk
        (page,) = self.pool.take(1)
        self._going_up[key] = page
        self._begin(key, source.tier, source.begin_read(key), Tier.DEVICE, page)
        return True

    # Down

    def put_aside(self, pages: Iterable[int], order: float) -> None:
        """Pages of a sequence that was put aside: to be copied to the host ahead of their eviction, those
        of the sequence that is expected to run again last first (FastServe's order of swapping out). What
        a page was offered for before, with other content or in another order, does not count any more."""
        for page in pages:
            self._put_aside.discard(page)
            key = self.pool.key_of.get(page)
            if key is not None and not self._is_below(key):
                self._put_aside.push((-order, page), key)

    def _copy_down(self) -> None:
        room = self._max_in_flight - len(self.in_flight)
        while room > 0 and (entry := self._put_aside.first()) is not None:
            (_, page), key = entry
            self._put_aside.discard(page)
            if self.pool.page_of.get(key) == page and not self._begin_down(key, page):
                return
            room = self._max_in_flight - len(self.in_flight)
        if room <= 0 or len(self.pool.free) * _FREE_SHARE > self.pool.num_pages:
            return
        # Half the host at most, or the pages that are looked at would push each other out for ever.
        window = max(0, min(_LOOK_AHEAD, self.host.num_pages // 2 - len(self.host.arriving)))
        candidates = [
            page for page in islice(self.pool.cached, window) if not self._is_below(self.pool.key_of[page])
        ]
        for page in candidates[:room]:
            if not self._begin_down(self.pool.key_of[page], page):
                return

    def _begin_down(self, key: bytes, page: int) -> bool:
        """Copy one device page to the host, unless it is there. -> whether there was room"""
        if self._is_below(key):
            return True
        target = self.host.make_room()
        if target is None:
            return False
        self.pool.hold(page)
        self.host.arriving.add(key)
        self._begin(key, Tier.DEVICE, page, Tier.HOST, target)
        return True

    def _is_below(self, key: bytes) -> bool:
        return self.host.has(key) or key in self.host.arriving or self.disk.has(key)

    def _write_behind(self, key: bytes) -> None:
        """What came to the host goes to the disk as well, so that the host may evict it at any time."""
        if not self.disk.num_pages or self.disk.has(key) or key in self.disk.arriving:
            return
        if len(self.in_flight) >= self._max_in_flight:
            return
        target = self.disk.make_room()
        if target is not None:
            self.disk.arriving.add(key)
            self._begin(key, Tier.HOST, self.host.begin_read(key), Tier.DISK, target)

    # Both

    def take_copies(self) -> tuple[Copy, ...]:
        """Copies that begin with the next step."""
        if self.enabled:
            self._copy_down()
        copies, self._new = tuple(self._new), []
        return copies

    def ended(self, copied: Copied) -> list[int]:
        """A copy has ended. -> sequences whose pages are all there now, or will not come"""
        copy = self.in_flight.pop(copied.number)
        unwanted = copied.number in self._unwanted
        self._unwanted.discard(copied.number)
        ok = copied.ok and not unwanted
        if copy.source is Tier.DEVICE:
            self.pool.release([copy.source_page], first_out=True)
        else:
            # A failed write to the disk is not the host page's fault.
            damaged = unwanted or (not ok and copy.target is Tier.DEVICE)
            self._tier(copy.source).end_read(copy.key, not damaged)
        if copy.target is Tier.DEVICE:
            return self._arrived(copy, ok)
        self._tier(copy.target).end_write(copy.key, copy.target_page, ok)
        if ok and copy.target is Tier.HOST:
            self._write_behind(copy.key)
        return []

    def _arrived(self, copy: Copy, ok: bool) -> list[int]:
        page = self._going_up.pop(copy.key)
        if ok:
            self.pool.register(page, copy.key)
            self.num_up += 1
        self.pool.release([page])
        complete = []
        for seq_id, waits_for in list(self.fetches.items()):
            waits_for.discard(copy.key)
            if not waits_for:
                del self.fetches[seq_id]
                complete.append(seq_id)
        return complete

    def forget(self, key: bytes) -> None:
        """The content is not to be trusted: no tier offers it any more."""
        self._unwanted.update(number for number, copy in self.in_flight.items() if copy.key == key)
        for tier in (self.host, self.disk):
            if tier.has(key) and key not in tier.reading:
                tier.free.append(tier.page_of.pop(key))

    def _begin(self, key: bytes, source: Tier, source_page: int, target: Tier, target_page: int) -> None:
        self._next_number += 1
        copy = Copy(self._next_number, key, source, source_page, target, target_page)
        self.in_flight[copy.number] = copy
        self._new.append(copy)

    def _tier(self, tier: Tier) -> LowerTier:
        return self.host if tier is Tier.HOST else self.disk
