from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.tiers import DiskFile, HostPool, PageCosts, measure_copies
from tests.engine.tiers.small import key_of, small_storage


def test_measured_costs_are_positive_and_take_about_the_budget(tmp_path: Path):
    storage = small_storage()
    host = HostPool(storage, 4)
    disk = DiskFile(tmp_path / "kv", b"model", storage.page_bytes, 4)
    begun = time.perf_counter()
    costs = measure_copies(storage, host, disk, budget_s=0.02)
    assert time.perf_counter() - begun < 1.0
    assert costs.host_page_s is not None
    assert 0 < costs.host_page_s < 0.02
    assert costs.disk_page_s is not None
    assert 0 < costs.disk_page_s < 0.02
    assert not storage.pages.any()
    assert disk.index() == {}


@pytest.mark.parametrize("count", [2, 4])
def test_measuring_keeps_the_pages_of_the_file(tmp_path: Path, count: int):
    storage = small_storage()
    disk = DiskFile(tmp_path / "kv", b"model", storage.page_bytes, 4)
    content = memoryview(bytes(range(256)) * (storage.page_bytes // 256))
    for page in range(count):
        disk.write(page, key_of(page), content)
    assert measure_copies(storage, HostPool(storage, 4), disk).disk_page_s
    assert disk.index() == {key_of(page): page for page in range(count)}
    into = memoryview(bytearray(storage.page_bytes))
    assert all(disk.read(page, key_of(page), into) and into == content for page in range(count))
    assert not storage.pages.any()


def test_tiers_that_are_not_there_cost_nothing_to_measure():
    storage = small_storage()
    assert measure_copies(storage, HostPool(storage, 0)) == PageCosts(None, None)
    assert measure_copies(storage, HostPool(storage, 1)).disk_page_s is None


def test_a_disk_that_fails_is_not_measured(tmp_path: Path, monkeypatch, caplog):
    storage = small_storage()
    disk = DiskFile(tmp_path / "kv", b"model", storage.page_bytes, 4)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.tiers.disk.os.pwrite", full)
    costs = measure_copies(storage, HostPool(storage, 4), disk)
    assert costs.host_page_s
    assert costs.disk_page_s is None
    assert "No space left" in caplog.text
