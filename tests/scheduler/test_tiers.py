"""Pages below the device: down ahead of need, up when wanted, misses when a copy fails."""

from __future__ import annotations

import pytest

from scheduler.invariants import check_empty
from scheduler.pages import PagePool
from scheduler.plan import Copied, Copy, Tier
from scheduler.tiers import Tiers
from tests.scheduler.driver import TOKEN, Driver, request


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


class World:
    """A pool with tiers, and content named by numbers."""

    def __init__(
        self, pages: int = 8, host: int = 8, disk: int = 0, max_in_flight: int = 64, **index: int
    ) -> None:
        self.pool = PagePool(pages)
        on_disk = {key(int(name[1:])): page for name, page in index.items()}
        self.tiers = Tiers(self.pool, host, disk, max_in_flight, on_disk)

    def cached(self, *numbers: int) -> list[int]:
        pages = self.pool.take(len(numbers))
        for page, number in zip(pages, numbers, strict=True):
            self.pool.register(page, key(number))
        self.pool.release(pages)
        return pages

    def put_aside(self, order: float, *numbers: int) -> None:
        self.tiers.put_aside(self.cached(*numbers), order)

    def copies(self) -> list[tuple[int, Tier, Tier]]:
        """What begins now, by content."""
        self.begun = self.tiers.take_copies()
        return [(int.from_bytes(copy.key, "little"), copy.source, copy.target) for copy in self.begun]

    def land(self, ok: bool = True) -> list[int]:
        return [number for copy in self.begun for number in self.tiers.ended(Copied(copy.number, ok))]

    def on_host(self, *numbers: int) -> None:
        self.put_aside(0.0, *numbers)
        self.copies()
        self.land()

    def lose_device(self) -> None:
        self.pool.release(self.pool.take(self.pool.available))


def test_whoever_runs_again_last_comes_down_first() -> None:
    world = World(max_in_flight=4)
    world.put_aside(1.0, 10, 11)
    world.put_aside(9.0, 90, 91)
    world.put_aside(5.0, 50)
    first = {number for number, *_ in world.copies()}
    assert first == {90, 91, 50} | ({10, 11} & first)
    assert len(first) == 4
    world.land()
    assert {number for number, *_ in world.copies()} == {10, 11} - first


def test_a_page_that_is_offered_again_is_offered_once() -> None:
    """What it was offered for before does not count: neither the order nor the content."""
    world = World(pages=3, max_in_flight=1)
    pages = world.cached(1, 2)
    for round_number in range(100):
        world.tiers.put_aside(pages, float(round_number))
    world.tiers.put_aside(pages[:1], -1.0)
    assert len(world.tiers._put_aside) == 2
    assert len(world.tiers._put_aside._heap) <= 2 * 3 + 16
    assert world.copies() == [(2, Tier.DEVICE, Tier.HOST)]


def test_pages_of_new_content_are_not_offered_for_the_old_one() -> None:
    world = World(pages=4)
    for first in range(0, 400, 4):
        world.put_aside(0.0, *range(first, first + 4))
        world.lose_device()
    assert len(world.tiers._put_aside) <= 4
    world.put_aside(0.0, 999)
    assert world.copies() == [(999, Tier.DEVICE, Tier.HOST)]


def test_what_is_on_the_host_is_not_copied_again() -> None:
    world = World()
    world.on_host(1, 2)
    world.put_aside(3.0, 3)
    world.tiers.put_aside(list(world.pool.cached), 4.0)
    assert world.copies() == [(3, Tier.DEVICE, Tier.HOST)]


def test_a_page_on_its_way_is_held_and_then_evicted_first() -> None:
    world = World(pages=3)
    old, *_ = world.cached(7)
    world.put_aside(0.0, 1)
    world.copies()
    page = world.begun[0].source_page
    assert world.pool.references[page] == 1
    world.land()
    assert next(iter(world.pool.cached)) == page != old
    assert world.tiers.host.has(key(1))


def test_an_idle_cache_comes_down_only_when_memory_runs_short() -> None:
    roomy, short = World(pages=8), World(pages=8)
    roomy.cached(1, 2)
    short.cached(*range(7))
    assert roomy.copies() == []
    assert [number for number, *_ in short.copies()] == [6, 5, 4, 3]  # the next to be evicted; half the host


def test_copies_down_come_to_an_end() -> None:
    """The host is smaller than the cache: pages must not push each other out for ever."""
    world = World(pages=16, host=4)
    world.cached(*range(16))
    begun = 0
    for _ in range(50):
        begun += len(world.copies())
        world.land()
    assert begun <= 4
    assert world.copies() == []


def test_no_more_copies_than_allowed_are_in_flight() -> None:
    world = World(pages=32, host=32, max_in_flight=3)
    world.put_aside(0.0, *range(9))
    sizes = []
    while copies := world.copies():
        assert len(world.tiers.in_flight) <= 3
        sizes.append(len(copies))
        world.land()
    assert sizes == [3, 3, 3]


def test_a_failed_copy_down_is_a_miss_and_its_page_is_free_again() -> None:
    world = World()
    world.put_aside(0.0, 1)
    world.copies()
    world.land(ok=False)
    assert not world.tiers.host.has(key(1))
    assert len(world.tiers.host.free) == 8


def test_content_goes_up_for_the_one_that_waits() -> None:
    world = World(pages=4)
    world.on_host(1, 2)
    world.lose_device()
    assert list(map(world.tiers.has, map(key, (1, 2, 3)))) == [True, True, False]
    assert world.tiers.fetch(77, [key(1), key(2)])
    world.copies()
    assert world.pool.find(key(1)) is None  # not before it has landed
    assert world.tiers.ended(Copied(world.begun[0].number)) == []
    assert world.tiers.ended(Copied(world.begun[1].number)) == [77]
    assert world.pool.find(key(1)) is not None
    assert world.pool.num_held == 0


def test_two_that_wait_for_the_same_content_share_a_copy() -> None:
    world = World(pages=4)
    world.on_host(1)
    world.lose_device()
    assert world.tiers.fetch(7, [key(1)])
    assert world.tiers.fetch(8, [key(1)])
    assert len(world.copies()) == 1
    assert world.land() == [7, 8]


def test_a_fetch_brings_what_there_is_room_for() -> None:
    world = World(pages=4, max_in_flight=2)
    world.on_host(1, 2)
    world.on_host(3)
    world.lose_device()
    assert world.tiers.fetch(7, [key(1), key(2), key(3)])
    assert len(world.copies()) == 2
    assert not world.tiers.fetch(8, [key(3)])
    assert world.land() == [7]


@pytest.mark.parametrize("ok", [True, False])
def test_who_left_is_not_reported_when_its_copy_ends(ok: bool) -> None:
    world = World(pages=4)
    world.on_host(1)
    world.lose_device()
    world.tiers.fetch(7, [key(1)])
    world.copies()
    world.tiers.forget_sequence(7)
    assert world.land(ok) == []
    assert world.pool.num_held == 0


def test_a_failed_fetch_is_a_miss_and_lets_the_waiting_one_go() -> None:
    world = World(pages=4)
    world.on_host(1)
    world.lose_device()
    world.tiers.fetch(7, [key(1)])
    world.copies()
    assert world.land(ok=False) == [7]
    assert world.pool.find(key(1)) is None
    assert not world.tiers.has(key(1))


def test_what_comes_to_the_host_is_written_behind_to_the_disk() -> None:
    world = World(disk=8)
    world.on_host(1)
    assert world.copies() == [(1, Tier.HOST, Tier.DISK)]
    world.land()
    assert world.tiers.disk.has(key(1))
    assert world.copies() == []


def test_a_failed_write_behind_leaves_the_host_page() -> None:
    world = World(disk=8)
    world.on_host(1)
    world.copies()
    world.land(ok=False)
    assert world.tiers.host.has(key(1))
    assert not world.tiers.disk.has(key(1))


def test_a_page_that_is_read_is_not_evicted() -> None:
    """The host has one page, being written to the disk: the next one must wait."""
    world = World(host=1, disk=8)
    world.on_host(1)
    world.copies()
    behind = world.begun
    world.put_aside(0.0, 2)
    assert world.copies() == []
    world.begun = behind
    world.land()
    world.put_aside(0.0, 3)
    assert world.copies() == [(3, Tier.DEVICE, Tier.HOST)]


def test_what_the_disk_held_before_the_start_is_found() -> None:
    world = World(disk=4, k5=2)
    assert list(map(world.tiers.has, (key(5), key(6)))) == [True, False]
    assert world.tiers.fetch(1, [key(5)])
    assert world.copies() == [(5, Tier.DISK, Tier.DEVICE)]
    assert (world.begun[0].source_page, world.land()) == (2, [1])


def test_a_damaged_page_of_the_disk_is_forgotten() -> None:
    world = World(disk=4, k5=2)
    world.tiers.fetch(1, [key(5)])
    world.copies()
    assert world.land(ok=False) == [1]
    assert not world.tiers.disk.has(key(5))
    assert sorted(world.tiers.disk.free) == [0, 1, 2, 3]


def test_content_that_went_wrong_is_offered_by_no_tier_not_even_when_its_copy_lands() -> None:
    world = World()
    world.on_host(1)
    world.put_aside(0.0, 2)
    world.copies()
    for number in (1, 2):
        world.tiers.forget(key(number))
    world.land()
    assert not any(map(world.tiers.has, (key(1), key(2))))
    assert not world.tiers._unwanted


def test_content_that_went_wrong_while_it_was_written_to_the_disk_leaves_the_host_as_well() -> None:
    world = World(disk=4)
    world.on_host(1)
    assert world.copies() == [(1, Tier.HOST, Tier.DISK)]
    world.tiers.forget(key(1))
    world.land()
    assert not world.tiers.has(key(1))
    assert len(world.tiers.host.free) == 8
    assert len(world.tiers.disk.free) == 4


def test_without_host_pages_there_are_no_tiers() -> None:
    tiers = World(host=0, disk=8, k5=2).tiers
    assert not tiers.enabled
    assert tiers.disk.num_pages == 0
    assert not tiers.has(key(5))


# In a scheduler


def _long_put_aside(**config: object) -> Driver:
    """`long` has computed 8 pages, was put aside, and its pages have come to the host."""
    driver = Driver(policy="mlfq", num_pages=16, host_pages=32, max_num_seqs=2, **config)
    driver.add(request("long", 32, max_tokens=8))
    driver.step()
    driver.set_aside(0)
    while copies := driver.scheduler._tiers.take_copies():
        driver.under_way += copies
        driver.land()
    driver.forget_cached_content()
    return driver


def test_a_sequence_that_lost_its_pages_has_them_fetched_and_computes_nothing_twice() -> None:
    driver = _long_put_aside()
    while driver.scheduler._sequences[0].num_computed == 0:
        plan = driver.plan()
        driver.apply(plan)
        assert plan.slices or driver.under_way
        driver.land()
    stats = driver.scheduler.stats()
    assert stats.num_pages_up == 8
    assert stats.recomputed_tokens == 0
    assert (stats.num_resumed_fetched, stats.num_resumed_recomputed) == (1, 0)
    output = [token for news in driver.finish() for token in news.tokens]
    assert output == [TOKEN] * len(output)
    check_empty(driver.scheduler)


def test_when_every_fetch_fails_it_is_computed_again() -> None:
    driver = _long_put_aside()
    for _ in range(60):
        if not driver.scheduler._sequences:
            break
        driver.apply(driver.plan())
        driver.land(ok=False)
    stats = driver.scheduler.stats()
    assert not driver.scheduler._sequences
    assert stats.recomputed_tokens >= 24
    assert stats.num_pages_up == 0


def test_others_go_on_while_pages_are_fetched() -> None:
    driver = _long_put_aside()
    driver.add(request("short", 4, max_tokens=8, arrival_s=1.0))
    steps = []
    while not steps or "long.0" not in steps[-1]:
        steps.append(set(driver.step()))
        driver.land()
    assert steps[:-1] == [{"short.0"}] * 4  # two copies at a time: an eighth of the pages
    assert steps[-1] == {"long.0", "short.0"}


def test_who_is_aborted_while_its_pages_come_leaves_nothing_behind() -> None:
    driver = _long_put_aside()
    driver.step()
    assert driver.scheduler.stats().num_parked == 1
    driver.scheduler.abort("long")
    driver.land()
    check_empty(driver.scheduler)


def _copy_targets(copies: list[Copy]) -> set[tuple[Tier, int]]:
    return {(copy.target, copy.target_page) for copy in copies}


def test_two_copies_never_write_the_same_page() -> None:
    world = World(pages=16, host=4, disk=4)
    for round_number in range(20):
        world.put_aside(0.0, *range(round_number * 3, round_number * 3 + 3))
        world.copies()
        in_flight = list(world.tiers.in_flight.values())
        assert len(_copy_targets(in_flight)) == len(in_flight)
        world.land()
