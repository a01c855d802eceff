"""What a page's copy costs on this machine, measured in a few milliseconds at start-up."""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from engine.tiers.disk import KEY_BYTES
from engine.tiers.lanes import lane_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.kv_storage import KVStorage
    from engine.tiers.disk import DiskFile
    from engine.tiers.host import HostPool

logger = logging.getLogger("octavo.engine")

_PAGES: Final = 8  # in a group, as many as a real one might have


class PageCosts(NamedTuple):
    """Seconds per page, of the slower of both ways; None for a tier that is not there."""

    host_page_s: float | None
    disk_page_s: float | None


def measure_copies(
    storage: KVStorage, host: HostPool, disk: DiskFile | None = None, budget_s: float = 0.02
) -> PageCosts:
    """Copy the first pages to and fro for about `budget_s`. Call it before any page is in use: host
    pages are overwritten. Device pages get back what they held; the file keeps what it holds.

    On a CPU the figures are a floor: so few pages lie in the processor's caches. What is written to the
    file goes to the system's memory first, as it mostly does in service; a disk that is slower than that
    shows only when the file outgrows the memory.
    """
    count = min(_PAGES, host.num_pages, len(storage.pages))
    if not count:
        return PageCosts(None, None)
    lane = lane_for(storage)
    fence = lane.fence()
    pages = [(page, page) for page in range(count)]
    ways = [partial(way, fence, pages, host.cells) for way in (lane.to_host, lane.to_device)]
    for way in ways:  # memory is slower when it is first touched
        way()
    host_page_s = max(_seconds(way, budget_s / 4) for way in ways) / count
    return PageCosts(host_page_s, _disk_page_s(disk, host, budget_s / 4) if disk else None)


def _disk_page_s(disk: DiskFile, host: HostPool, budget_s: float) -> float | None:
    try:
        taken = disk.index()
        used = set(taken.values())
        spare = next((page for page in range(disk.num_pages) if page not in used), None)
        if spare is None:  # full of pages from before, which are worth more than a measurement of writing
            key, page = next(iter(taken.items()))
            return _seconds(lambda: disk.read(page, key, host.page(0)), budget_s)
        key = os.urandom(KEY_BYTES)
        write_s = _seconds(lambda: disk.write(spare, key, host.page(0)), budget_s)
        read_s = _seconds(lambda: disk.read(spare, key, host.page(0)), budget_s)
        disk.erase(spare)
    except OSError as error:
        logger.warning("%s: copies cannot be measured: %s", disk.path, error.strerror)
        return None
    return max(write_s, read_s)


def _seconds(action: Callable[[], object], budget_s: float) -> float:
    """The mean of as many calls as fit, at least one."""
    begun = now = time.perf_counter()
    calls = 0
    while not calls or now - begun < budget_s:
        action()
        calls += 1
        now = time.perf_counter()
    return (now - begun) / calls
