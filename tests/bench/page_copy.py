"""What a KV page costs on its ways between the tiers, with the default model's shape.

    python -m tests.bench.page_copy [--pages 512] [--disk FILE] [--sync] [--device cuda]

Copies go through the copy thread as they do in service, a plan's worth at a time; seconds per page are wall
clock from start to report. The file is written to and read from the system's memory where that suffices:
`--sync` brings each plan's pages to the disk, and reads them from there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.kv_storage import KVStorage
from engine.models.config import Layer, Rope, TransformerConfig
from engine.tiers import Copier, DiskFile, HostPool, measure_copies
from scheduler.plan import Copy, Tier

SMOLLM2_135M = TransformerConfig(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    layers=(Layer(rope=Rope(theta=100000.0, num_rotated=64)),) * 30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_positions=8192,
)
PAGE_SIZE = 16
PLAN_COPIES = 64
WAYS = (
    (Tier.DEVICE, Tier.HOST),
    (Tier.HOST, Tier.DEVICE),
    (Tier.HOST, Tier.DISK),
    (Tier.DISK, Tier.DEVICE),
)


def page_s(copier: Copier, source: Tier, target: Tier, num_pages: int, after: Callable[[], None]) -> float:
    """Seconds per page; every copy must succeed."""
    begun = time.perf_counter()
    for first in range(0, num_pages, PLAN_COPIES):
        pages = range(first, min(first + PLAN_COPIES, num_pages))
        copier.start([Copy(page, page.to_bytes(32, "little"), source, page, target, page) for page in pages])
        while copier.num_in_flight:
            copier.wait(1.0)
            assert all(copied.ok for copied in copier.finished())
        after()
    return (time.perf_counter() - begun) / num_pages


def measure(num_pages: int, path: Path, sync: bool, device: torch.device) -> None:
    storage = KVStorage(SMOLLM2_135M, num_pages, PAGE_SIZE, torch.bfloat16, device)
    host = HostPool(storage, num_pages)
    disk = DiskFile(path, b"bench", storage.page_bytes, num_pages)
    costs = measure_copies(storage, host, disk)
    for layer in (*storage.keys, *storage.values):
        layer.normal_()

    def flush() -> None:
        if sync:
            descriptor = os.open(path, os.O_RDWR)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    copier = Copier(storage, host, disk)
    print(f"{num_pages} pages of {storage.page_bytes} bytes, {device}, file {path}{' (synced)' * sync}")
    print(f"{'way':18}{'first us/page':>15}{'again us/page':>15}{'GB/s':>8}")
    for source, target in WAYS:
        after = flush if target == Tier.DISK else lambda: None
        first, again = (page_s(copier, source, target, num_pages, after) for _ in range(2))
        way = f"{source.name.lower()} to {target.name.lower()}"
        rate = storage.page_bytes / again / 1e9
        print(f"{way:18}{first * 1e6:15.0f}{again * 1e6:15.0f}{rate:8.2f}")
    copier.close()
    print(f"at start-up: host_page_s = {costs.host_page_s:.2e}, disk_page_s = {costs.disk_page_s:.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per KV page between device, host and disk.")
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--disk", type=Path, help="the file; default: a temporary one")
    parser.add_argument("--sync", action="store_true", help="to the disk and from it")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.disk or Path(folder) / "pages"
        measure(options.pages, path, options.sync, torch.device(options.device))


if __name__ == "__main__":
    main()
