"""Copies between tiers on a CPU: contents, order, reports, failures."""

from __future__ import annotations

import os
import random
import select
import threading
import time
from pathlib import Path

import pytest
import torch

from engine.tiers import Copier, DiskFile, HostPool
from scheduler.plan import Copied, Copy, Tier
from tests.engine.tiers.small import (
    all_ended,
    back,
    content,
    fill,
    from_disk,
    key_of,
    out,
    small_storage,
    to_disk,
)


@pytest.fixture
def storage():
    found = small_storage()
    fill(found)
    return found


@pytest.fixture
def host(storage):
    return HostPool(storage, 16)


@pytest.fixture
def disk(storage, tmp_path: Path):
    return DiskFile(tmp_path / "kv", b"model", storage.page_bytes, 8)


@pytest.fixture
def build(storage, host):
    """Builds copiers, and closes them whatever the test does."""
    copiers = []

    def make(**options) -> Copier:
        copiers.append(Copier(storage, host, **options))
        return copiers[-1]

    yield make
    for copier in copiers:
        copier.close()
        assert not copier._thread.is_alive()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_page_comes_back_as_it_left(dtype):
    storage = small_storage(dtype=dtype)
    fill(storage)
    copier = Copier(storage, HostPool(storage, 4))
    copier.start([out(1, 3, 2), back(2, 2, 9)])
    assert all_ended(copier) == [Copied(1), Copied(2)]
    assert torch.equal(storage.pages[9], content(storage, 3))
    untouched = [page for page in range(16) if page != 9]
    assert all(torch.equal(storage.pages[page], content(storage, page)) for page in untouched)
    copier.close()


def test_a_page_comes_back_from_disk(build, storage, disk):
    copier = build(disk=disk)
    copier.start([out(1, 3, 0), to_disk(2, key_of(3), 0, 5)])
    assert all(copied.ok for copied in all_ended(copier))
    copier.start([from_disk(3, key_of(3), 5, 11)])
    assert all_ended(copier) == [Copied(3)]
    assert torch.equal(storage.pages[11], content(storage, 3))


def test_more_pages_than_a_group_holds(build, storage, host, disk, monkeypatch):
    monkeypatch.setattr("engine.tiers.copier.GROUP_BYTES", 3 * storage.page_bytes)
    copier = build(disk=disk)
    copier.start([out(page, page, 15 - page) for page in range(8)])
    copier.start([to_disk(10 + page, key_of(page), 15 - page, page) for page in range(8)])
    copier.start([from_disk(20 + page, key_of(page), page, 15 - page) for page in range(8)])
    numbers = [*range(8), *range(10, 18), *range(20, 28)]
    assert all_ended(copier) == [Copied(number) for number in numbers]
    assert all(torch.equal(storage.pages[15 - page], content(storage, page)) for page in range(8))


def test_start_and_finished_do_not_wait(build):
    gate = threading.Event()
    copier = build(before=lambda copy: gate.wait(10))
    begun = time.perf_counter()
    copier.start([out(1, 0, 0)])
    assert copier.finished() == ()
    copier.wait(0.02)
    assert time.perf_counter() - begun < 5
    assert copier.num_in_flight == 1
    gate.set()
    assert all_ended(copier) == [Copied(1)]
    assert copier.num_in_flight == 0


def test_nothing_of_a_page_is_reported_before_it_is_there(build, storage):
    gate = threading.Event()
    copier = build(before=lambda copy: gate.wait(10) if copy.number == 2 else None)
    copier.start([out(1, 0, 0), back(2, 0, 7)])
    copier.wait(5)
    assert copier.finished() == (Copied(1),)
    assert copier.finished() == ()
    assert torch.equal(storage.pages[7], content(storage, 7))
    gate.set()
    assert all_ended(copier) == [Copied(2)]
    assert torch.equal(storage.pages[7], content(storage, 0))


def test_a_later_copy_into_a_freed_page_does_not_pass_an_earlier_one(build, storage):
    """The first copy is slow; the second reads where it writes, the third writes where it reads."""
    copier = build(before=lambda copy: time.sleep(0.02) if copy.number == 1 else None)
    copier.start([out(1, 3, 0)])
    copier.start([back(2, 0, 4)])
    copier.start([back(3, 1, 3)])
    assert [copied.number for copied in all_ended(copier)] == [1, 2, 3]
    assert torch.equal(storage.pages[4], content(storage, 3))
    assert not storage.pages[3].any()


def test_a_failed_copy_fails_alone_and_the_thread_lives_on(build, storage, host, caplog):
    def fail(copy: Copy) -> None:
        if copy.number in (2, 3):
            raise RuntimeError("the k-th copy fails")

    copier = build(before=fail)
    copier.start([out(number, number, number) for number in range(6)])
    expected = [Copied(number, number not in (2, 3)) for number in range(6)]
    assert all_ended(copier) == expected
    assert not host.cells[2].any()
    assert caplog.text.count("could not be copied") == 1
    assert copier.take_failed() == (Tier.HOST, Tier.HOST)
    copier.start([out(9, 9, 9)])
    assert all_ended(copier) == [Copied(9)]


def test_a_disk_that_fails_now_and_then_does_not_fill_the_log(build, disk, caplog):
    """Also where every failure is the first after a success."""

    def fail(copy: Copy) -> None:
        if copy.number % 2 and copy.target is Tier.DISK:
            raise OSError("now and then")

    copier = build(disk=disk, before=fail)
    for number in range(0, 40, 2):
        copier.start([out(number, 0, 0)])
        copier.start([to_disk(number + 1, key_of(0), 0, 0)])
        all_ended(copier)
    assert copier.take_failed() == (Tier.DISK,) * 20
    assert caplog.text.count("could not be copied") == 1


def test_a_group_that_fails_is_done_page_by_page(storage, host):
    class Lane:
        """Cannot take several at a time, and never page 2."""

        def fence(self) -> None: ...

        def to_host(self, fence, pages, cells) -> None:
            if len(pages) > 1 or pages[0][0] == 2:
                raise MemoryError
            cells[pages[0][1]] = storage.pages[pages[0][0]]

    copier = Copier(storage, host, lane=Lane())
    copier.start([out(number, number, number) for number in range(5)])
    assert all_ended(copier) == [Copied(number, number != 2) for number in range(5)]
    assert torch.equal(host.cells[4], content(storage, 4))
    copier.close()


def test_ways_that_are_not_there_fail(build):
    copier = build()
    copier.start([to_disk(1, key_of(1), 0, 0), from_disk(2, key_of(1), 0, 0)])
    copier.start([Copy(3, key_of(1), Tier.DISK, 0, Tier.HOST, 0), out(4, 0, 0)])
    assert all_ended(copier) == [Copied(1, False), Copied(2, False), Copied(3, False), Copied(4)]
    assert copier.take_failed() == (Tier.DISK, Tier.DEVICE, Tier.HOST)
    assert copier.take_failed() == ()


def test_a_damaged_page_of_the_file_never_reaches_the_device(build, storage, disk):
    copier = build(disk=disk)
    copier.start([out(page, page, page) for page in range(3)])
    copier.start([to_disk(10 + page, key_of(page), page, page) for page in range(3)])
    assert all(copied.ok for copied in all_ended(copier))
    raw = bytearray(disk.path.read_bytes())
    raw[-disk.page_bytes * 7 + 1000] ^= 1  # in page 1 of 8
    disk.path.write_bytes(raw)
    copier.start([from_disk(20 + page, key_of(page), page, 10 + page) for page in range(3)])
    assert all_ended(copier) == [Copied(20), Copied(21, False), Copied(22)]
    assert copier.take_failed() == (Tier.DEVICE,)
    assert torch.equal(storage.pages[10], content(storage, 0))
    assert torch.equal(storage.pages[11], content(storage, 11))
    assert torch.equal(storage.pages[12], content(storage, 2))


def test_a_full_disk_fails_copies_and_nothing_else(build, storage, disk, monkeypatch, caplog):
    copier = build(disk=disk)
    copier.start([out(1, 1, 1)])
    all_ended(copier)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("engine.tiers.disk.os.pwrite", full)
        copier.start([to_disk(10 + page, key_of(page), 1, page) for page in range(5)])
        assert not any(copied.ok for copied in all_ended(copier))
    assert caplog.text.count("No space left") == 1
    copier.start([to_disk(20, key_of(1), 1, 1), from_disk(21, key_of(1), 1, 8)])
    assert all_ended(copier) == [Copied(20), Copied(21)]
    assert torch.equal(storage.pages[8], content(storage, 1))


def test_the_file_descriptor_says_when_there_is_news(build):
    copier = build()
    poller = select.poll()
    poller.register(copier.fileno(), select.POLLIN)
    assert not poller.poll(0)
    copier.start([out(1, 0, 0), back(2, 0, 1), out(3, 1, 1)])
    while copier.num_in_flight:
        assert poller.poll(5000)
        copier.finished()
    assert not poller.poll(0)
    begun = time.perf_counter()
    copier.wait(10)  # for nothing
    assert time.perf_counter() - begun < 5


def test_the_copy_thread_yields_to_those_who_compute(build):
    copier = build()
    copier.start([out(1, 0, 0)])
    all_ended(copier)
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert os.getpriority(os.PRIO_PROCESS, copier._thread.native_id) > mine


def test_close_drops_what_has_not_begun_and_gives_the_file_free(storage, host, disk):
    gate = threading.Event()
    begun: list[int] = []

    def before(copy: Copy) -> None:
        begun.append(copy.number)
        gate.wait(10)

    copier = Copier(storage, host, disk, before=before)
    copier.start([out(1, 0, 0)])
    copier.start([out(2, 1, 1)])
    threading.Timer(0.05, gate.set).start()
    copier.close()
    copier.close()
    assert 2 not in begun
    assert copier.num_in_flight == 0
    assert copier.finished() == ()
    DiskFile(disk.path, b"model", storage.page_bytes, 8).close()


@pytest.mark.parametrize("seed", range(6))
def test_stress_against_a_model(storage, host, disk, seed):
    """Random copies between all tiers, some of which fail, while the device writes other pages: what is
    reported ok is there, everything is reported once, and no page that was not a target has changed."""
    chance = random.Random(seed)
    doomed: set[int] = set()

    def before(copy: Copy) -> None:
        if copy.number in doomed:
            raise OSError("doomed")
        if copy.number % 7 == 0:
            time.sleep(0.0005)

    copier = Copier(storage, host, disk, before=before)
    sizes = {Tier.DEVICE: 16, Tier.HOST: 16, Tier.DISK: 8}
    holds = {(Tier.DEVICE, page): page for page in range(16)}  # place -> content
    flying: dict[int, Copy] = {}
    ways = [
        (Tier.DEVICE, Tier.HOST),
        (Tier.HOST, Tier.DEVICE),
        (Tier.HOST, Tier.DISK),
        (Tier.DISK, Tier.DEVICE),
    ]
    number = 0
    next_content = 100
    try:
        for _ in range(250):
            busy = {place for copy in flying.values() for place in _places(copy)}
            batch = []
            for _ in range(chance.randrange(5)):
                source, target = chance.choice(ways)
                sources = [place for place in holds if place[0] == source and place not in busy]
                targets = [(target, page) for page in range(sizes[target]) if (target, page) not in busy]
                if not sources or not targets:
                    continue
                start, end = chance.choice(sources), chance.choice(targets)
                number += 1
                copy = Copy(number, key_of(holds[start]), *start, *end)
                if chance.random() < 0.1:
                    doomed.add(number)
                busy |= {start, end}
                flying[number] = copy
                batch.append(copy)
            copier.start(batch)
            idle = [page for page in range(16) if (Tier.DEVICE, page) not in busy]
            for page in chance.sample(idle, min(2, len(idle))):  # the device computes
                next_content += 1
                storage.pages[page] = content(storage, next_content)
                holds[Tier.DEVICE, page] = next_content
            if chance.random() < 0.3:
                copier.wait(0.01)
            for copied in copier.finished():
                _land(flying.pop(copied.number), copied, doomed, holds, storage, host)
        for copied in all_ended(copier):
            _land(flying.pop(copied.number), copied, doomed, holds, storage, host)
        assert not flying
        for (tier, page), held in holds.items():
            if tier == Tier.DEVICE:
                assert torch.equal(storage.pages[page], content(storage, held))
            elif tier == Tier.HOST:
                assert torch.equal(host.cells[page], content(storage, held))
    finally:
        copier.close()


def _places(copy: Copy) -> tuple[tuple[Tier, int], tuple[Tier, int]]:
    return (copy.source, copy.source_page), (copy.target, copy.target_page)


def _land(copy, copied, doomed, holds, storage, host) -> None:
    start, end = _places(copy)
    assert copied.ok == (copy.number not in doomed)
    if not copied.ok:
        return  # the hook fails a copy before it begins: the target is what it was
    holds[end] = holds[start]
    expected = content(storage, holds[start])
    if copy.target == Tier.DEVICE:
        assert torch.equal(storage.pages[copy.target_page], expected)
    elif copy.target == Tier.HOST:
        assert torch.equal(host.cells[copy.target_page], expected)
