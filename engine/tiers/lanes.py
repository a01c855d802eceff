"""The leg of a copy between device and host: plain copies beside a CPU, a stream of its own on a GPU.

Both return from `to_host` and `to_device` only when the bytes have landed; the copy thread calls them, so
that computing goes on meanwhile.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine.kv_storage import KVStorage


class Lane(Protocol):
    """Pages are pairs (device page, page of `host`); `host` is [pages, layers, 2, Hkv, page_size, D]."""

    def fence(self) -> Any:
        """Called by the computing thread: marks what it has asked of the device until now."""

    def to_host(self, fence: Any, pages: Sequence[tuple[int, int]], host: torch.Tensor) -> None: ...

    def to_device(self, fence: Any, pages: Sequence[tuple[int, int]], host: torch.Tensor) -> None: ...


def lane_for(storage: KVStorage) -> Lane:
    return CudaLane(storage) if storage.pages.device.type == "cuda" else CpuLane(storage)


class CpuLane:
    """Page by page with numpy: it lets go of the interpreter, and unlike torch it starts no team of threads
    of its own, which would take the cores from those that compute."""

    def __init__(self, storage: KVStorage) -> None:
        self._pages = _as_bytes(storage.pages)

    def fence(self) -> None:
        """On a CPU everything that was asked has been done."""

    def to_host(self, fence: None, pages: Sequence[tuple[int, int]], host: torch.Tensor) -> None:
        target = _as_bytes(host)
        for device_page, host_page in pages:
            np.copyto(target[host_page], self._pages[device_page])

    def to_device(self, fence: None, pages: Sequence[tuple[int, int]], host: torch.Tensor) -> None:
        source = _as_bytes(host)
        for device_page, host_page in pages:
            np.copyto(self._pages[device_page], source[host_page])


class CudaLane:
    """Gathers pages on the device and moves each in one transfer, on a stream of its own.

    Both ways begin after the fence: the computing stream may still write the source of a copy out, and
    still read what the target of a copy in held before. The end is an event recorded *after* the copies;
    once it has passed, the bytes are visible to all that is launched later, on any stream.

    `cuda` is torch.cuda, or what a test puts in its place.
    """

    def __init__(self, storage: KVStorage, cuda: Any = torch.cuda) -> None:
        self._pages = storage.pages
        self._cuda = cuda
        self._stream = cuda.Stream(storage.pages.device)

    def fence(self) -> Any:
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._pages.device))
        return event

    def to_host(self, fence: Any, pages: Sequence[tuple[int, int]], host: torch.Tensor) -> None:
        with self._landed(fence):
            gathered = self._pages.index_select(0, self._index(pages))
            for row, (_, host_page) in zip(gathered, pages, strict=True):
                host[host_page].copy_(row, non_blocking=True)

    def to_device(self, fence: Any, pages: Sequence[tuple[int, int]], host: torch.Tensor) -> None:
        with self._landed(fence):
            staged = torch.empty(
                (len(pages), *self._pages.shape[1:]), dtype=host.dtype, device=self._pages.device
            )
            for row, (_, host_page) in zip(staged, pages, strict=True):
                row.copy_(host[host_page], non_blocking=True)
            self._pages.index_copy_(0, self._index(pages), staged)

    @contextmanager
    def _landed(self, fence: Any) -> Iterator[None]:
        with self._cuda.stream(self._stream):
            self._stream.wait_event(fence)
            try:
                yield
            finally:
                # Also after an error: what was launched before it may still be on its way to these pages.
                done = self._cuda.Event(blocking=True)
                done.record(self._stream)
                done.synchronize()

    def _index(self, pages: Sequence[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor([page for page, _ in pages], dtype=torch.int64, device=self._pages.device)


def _as_bytes(pages: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The same memory; numpy knows no bfloat16."""
    return pages.view(torch.uint8).numpy()
