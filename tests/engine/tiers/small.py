"""Small pages whose content says which page it is."""

from __future__ import annotations

import hashlib
import time

import torch

from engine.kv_storage import KVStorage
from engine.tiers import Copier
from scheduler.plan import Copied, Copy, Tier
from tests.engine.tiny import CPU, TINY

PAGE_SIZE = 4
END_TIMEOUT_S = 20.0


def small_storage(num_pages: int = 16, dtype: torch.dtype = torch.bfloat16) -> KVStorage:
    return KVStorage(TINY, num_pages, PAGE_SIZE, dtype, CPU)


def content(storage: KVStorage, number: int) -> torch.Tensor:
    """What page `number` of a test holds: noise, different in every layer, the same on each call."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(storage.page_shape, generator=generator).to(storage.pages.dtype)


def fill(storage: KVStorage) -> None:
    for page in range(len(storage.pages)):
        storage.pages[page] = content(storage, page)


def key_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def out(number: int, device_page: int, host_page: int) -> Copy:
    return Copy(number, key_of(number), Tier.DEVICE, device_page, Tier.HOST, host_page)


def back(number: int, host_page: int, device_page: int) -> Copy:
    return Copy(number, key_of(number), Tier.HOST, host_page, Tier.DEVICE, device_page)


def to_disk(number: int, key: bytes, host_page: int, disk_page: int) -> Copy:
    return Copy(number, key, Tier.HOST, host_page, Tier.DISK, disk_page)


def from_disk(number: int, key: bytes, disk_page: int, device_page: int) -> Copy:
    return Copy(number, key, Tier.DISK, disk_page, Tier.DEVICE, device_page)


def all_ended(copier: Copier) -> list[Copied]:
    """Every copy in flight, in the order of the reports."""
    ended: list[Copied] = []
    deadline = time.monotonic() + END_TIMEOUT_S
    while copier.num_in_flight:
        assert time.monotonic() < deadline, f"{copier.num_in_flight} copies never ended"
        copier.wait(1.0)
        ended.extend(copier.finished())
    return ended
