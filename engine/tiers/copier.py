"""Carries out the copies of a plan, one after the other, beside the computing."""

from __future__ import annotations

import logging
import math
import os
import queue
import select
import threading
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from engine.tiers.host import HostPool
from engine.tiers.lanes import lane_for
from engine.tiers.rare_warnings import RareWarnings
from scheduler.plan import Copied, Copy, Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from engine.kv_storage import KVStorage
    from engine.tiers.disk import DiskFile
    from engine.tiers.lanes import Lane

logger = logging.getLogger("octavo.engine")

GROUP_BYTES: Final = 4 << 20  # copied, then reported, at a time: a bus is busy, a step need not wait long
CLOSE_TIMEOUT_S: Final = 5.0
# Below the threads that compute: on two cores kept busy with checksums, a step took 2.4 times as long
# beside an equal copy thread, 1.3 times beside this one; idle cores it uses in full.
THREAD_NICENESS: Final = 10


class _Group(NamedTuple):
    """Consecutive copies of the same way."""

    fence: Any
    copies: tuple[Copy, ...]


class Copier:
    """One thread takes groups of copies in the order in which they were started.

    A copy is reported once, and `ok` only when all its bytes are where they belong. A copy that raises is
    reported as failed, alone. `start`, `finished`, `wait` and `close` belong to the engine's loop; `disk`
    belongs to the copier from here on. `before` is called in the copy thread with each copy before it
    begins; what it raises fails that copy (for tests).
    """

    def __init__(
        self,
        storage: KVStorage,
        host: HostPool,
        disk: DiskFile | None = None,
        *,
        lane: Lane | None = None,
        before: Callable[[Copy], None] | None = None,
    ) -> None:
        self._lane = lane or lane_for(storage)
        self.host = host
        self.disk = disk
        self._before = before
        self._group_pages = max(1, GROUP_BYTES // storage.page_bytes)
        self._staging = HostPool(storage, self._group_pages if disk else 0)  # from the file to the device
        self._warnings = RareWarnings()
        self._groups: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ended: list[tuple[Tier, Copied]] = []  # under the lock; the event is readable while it has any
        self._failed: list[Tier] = []
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._num_in_flight = 0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="octavo-copies", daemon=True)
        self._thread.start()

    @property
    def num_in_flight(self) -> int:
        """Copies that were started and not yet returned by `finished`."""
        return self._num_in_flight

    @property
    def has_news(self) -> bool:
        """Whether `finished` would return something."""
        return bool(self._ended)

    def fileno(self) -> int:
        """Readable while `finished` has news, for a loop that sleeps on several things."""
        return self._event

    def start(self, copies: Sequence[Copy]) -> None:
        """Begin, after all that the device was asked to compute until now. Returns at once."""
        assert not self._closing
        if not copies:
            return
        fence = self._lane.fence()
        self._num_in_flight += len(copies)
        for group in _groups(copies, self._group_pages):
            self._groups.put(_Group(fence, group))

    def finished(self) -> tuple[Copied, ...]:
        """The copies that have ended since the last call, in the order in which they were started."""
        if not self._num_in_flight:
            return ()
        with self._lock:
            ended, self._ended = self._ended, []
            if ended:
                os.eventfd_read(self._event)
        self._num_in_flight -= len(ended)
        self._failed += [target for target, copied in ended if not copied.ok]
        return tuple(copied for _, copied in ended)

    def take_failed(self) -> tuple[Tier, ...]:
        """Where those of the copies that `finished` returned since the last call should have gone which
        failed: a disk page that was damaged failed to reach the device."""
        failed, self._failed = tuple(self._failed), []
        return failed

    def wait(self, timeout_s: float) -> None:
        """Sleep until `finished` has news, at most `timeout_s`; not at all when nothing is in flight."""
        if self._num_in_flight:
            poller = select.poll()
            poller.register(self._event, select.POLLIN)
            poller.poll(math.ceil(timeout_s * 1000))

    def close(self) -> None:
        """End the thread and close the file. Copies that have not begun never will, and none is reported."""
        if self._closing:
            return
        self._closing = True
        self._num_in_flight = 0
        self._groups.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("a copy of KV pages does not end; it is left behind")
            return
        os.close(self._event)
        if self.disk is not None:
            self.disk.close()

    def _work(self) -> None:
        _yield_to_others(THREAD_NICENESS)
        while (group := self._groups.get()) is not None:
            ended = self._run(group)
            with self._lock:
                is_first = not self._ended
                self._ended.extend(ended)
                if is_first:  # whoever wakes up finds news
                    os.eventfd_write(self._event, 1)

    def _run(self, group: _Group) -> list[tuple[Tier, Copied]]:
        ready = [copy for copy in group.copies if self._may_begin(copy)]
        done = self._copy(group.fence, ready)
        return [(copy.target, Copied(copy.number, copy.number in done)) for copy in group.copies]

    def _may_begin(self, copy: Copy) -> bool:
        if self._closing:
            return False
        try:
            if self._before is not None:
                self._before(copy)
        except Exception as error:
            self._log_failure(copy, error)
            return False
        return True

    def _copy(self, fence: Any, copies: Sequence[Copy]) -> set[int]:
        """-> the numbers of those that succeeded. A group that fails is done again, page by page."""
        if not copies:
            return set()
        way = (copies[0].source, copies[0].target)
        try:
            return self._legs(way, fence, copies)
        except Exception as error:
            if len(copies) == 1:
                self._log_failure(copies[0], error)
                return set()
            return {number for copy in copies for number in self._copy(fence, [copy])}

    def _legs(self, way: tuple[Tier, Tier], fence: Any, copies: Sequence[Copy]) -> set[int]:
        match way:
            case (Tier.DEVICE, Tier.HOST):
                pages = [(copy.source_page, copy.target_page) for copy in copies]
                self._lane.to_host(fence, pages, self.host.cells)
            case (Tier.HOST, Tier.DEVICE):
                pages = [(copy.target_page, copy.source_page) for copy in copies]
                self._lane.to_device(fence, pages, self.host.cells)
            case (Tier.HOST, Tier.DISK) if self.disk is not None:
                for copy in copies:
                    self.disk.write(copy.target_page, copy.key, self.host.page(copy.source_page))
            case (Tier.DISK, Tier.DEVICE) if self.disk is not None:
                return self._from_disk(self.disk, fence, copies)
            case _:
                raise ValueError(f"no copies go from {way[0].name} to {way[1].name} here")
        return {copy.number for copy in copies}

    def _from_disk(self, disk: DiskFile, fence: Any, copies: Sequence[Copy]) -> set[int]:
        """Only what was read whole and verified goes on to the device."""
        found = [
            (copy, place)
            for place, copy in enumerate(copies)
            if disk.read(copy.source_page, copy.key, self._staging.page(place))
        ]
        if found:
            pages = [(copy.target_page, place) for copy, place in found]
            self._lane.to_device(fence, pages, self._staging.cells)
        return {copy.number for copy, _ in found}

    def _log_failure(self, copy: Copy, error: Exception) -> None:
        way = (copy.source.name.lower(), copy.target.name.lower())
        self._warnings.warn(way, "KV pages could not be copied from %s to %s: %s", *way, error)


def _yield_to_others(niceness: int) -> None:
    """Lower the priority of the calling thread; Linux has one for each."""
    thread = threading.get_native_id()
    with suppress(OSError):  # a sandbox may forbid it; copies work without
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


def _groups(copies: Sequence[Copy], limit: int) -> Iterator[tuple[Copy, ...]]:
    for _, same_way in groupby(copies, key=lambda copy: (copy.source, copy.target)):
        group = tuple(same_way)
        for first in range(0, len(group), limit):
            yield group[first : first + limit]
