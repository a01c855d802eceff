"""KV pages in host memory, page after page: one page is one run of bytes, for one transfer or one write."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from engine.kv_storage import zeros

if TYPE_CHECKING:
    from engine.kv_storage import KVStorage

logger = logging.getLogger("octavo.engine")


class HostPool:
    """`cells` is [num_pages, layers, 2, Hkv, page_size, D], of the dtype of `storage`.

    Beside a CPU the system hands out the memory as pages are first written. Beside a GPU all of it is
    locked (pinned) at once: only then do transfers run by themselves, beside the computing.
    """

    def __init__(self, storage: KVStorage, num_pages: int) -> None:
        self.num_pages = num_pages
        self.page_bytes = storage.page_bytes
        self.cells = zeros((num_pages, *storage.page_shape), storage.pages.dtype, torch.device("cpu"))
        if storage.pages.device.type == "cuda" and num_pages:
            _pin(self.cells)
        self._bytes = self.cells.view(torch.uint8).reshape(num_pages, self.page_bytes).numpy()

    def page(self, number: int) -> memoryview:
        """The bytes of one page, to read or to overwrite in place."""
        return memoryview(self._bytes[number])


def _pin(cells: torch.Tensor) -> None:
    """Lock the memory where it lies. torch's own pinned allocator would round up to a power of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(cells.data_ptr(), cells.nbytes, 0)
    if int(status) != 0:
        logger.warning(
            "%d bytes of host KV pages could not be pinned (CUDA error %d): copies still work, more slowly",
            cells.nbytes,
            int(status),
        )
