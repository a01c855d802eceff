"""The tensors behind KV pages. Which page belongs to whom is the scheduler's business."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.models.kv_groups import kv_groups, layers_per_page

if TYPE_CHECKING:
    from engine.models.config import TransformerConfig


class KVStorage:
    """Keys and values of every layer, each [num_pages, Hkv, page_size, D]; layers of different groups
    share tensors, as a page belongs to one group (`engine/models/kv_groups.py`).

    Zero at first, which keeps slots that nobody may see finite. Once numbers may have gone wrong somewhere
    (`tainted`), pages are cleared when they are handed out: a NaN would spread even from a weight of 0.
    Where a window slides, nobody might ever notice one that fell behind it.

    `scratch`: pages behind those of the scheduler, which nobody is ever given: for drafts that the model
    itself computes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_scratch_pages: int = 0,
    ) -> None:
        groups = kv_groups(config)
        layers = layers_per_page(groups)
        self.scratch = range(num_pages, num_pages + num_scratch_pages)
        self.tainted = any(group.span for group in groups)
        # One tensor, so that a page can be taken from all layers at once; a layer's part is contiguous.
        num_cells = num_pages + num_scratch_pages
        cells = zeros((layers, 2, num_cells, config.num_kv_heads, page_size, config.head_dim), dtype, device)
        places = {layer: place for group in groups for place, layer in enumerate(group.layers)}
        self.keys = [cells[places[layer], 0] for layer in range(config.num_layers)]
        self.values = [cells[places[layer], 1] for layer in range(config.num_layers)]
        self._slots = cells.view(layers * 2, -1, config.head_dim)
        self.pages = cells.movedim(2, 0)  # a view: [all pages, layers, 2, Hkv, page_size, D]

    @property
    def page_shape(self) -> tuple[int, ...]:
        """What one page holds: [layers of a group, 2 (keys, values), Hkv, page_size, D]."""
        return tuple(self.pages.shape[1:])

    @property
    def page_bytes(self) -> int:
        return math.prod(self.page_shape) * self.pages.dtype.itemsize

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy KV between flat rows of [num_pages, Hkv, page_size], in every layer of their pages. All are
        read before any is written, so sources may be targets."""
        self._slots.index_copy_(1, targets, self._slots.index_select(1, sources))

    def clear_slots(self, slots: torch.Tensor) -> None:
        """Of flat rows of [num_pages, Hkv, page_size], in every layer of their pages."""
        self._slots.index_fill_(1, slots, 0)

    def clear(self, pages: list[int]) -> None:
        index = torch.tensor(pages, dtype=torch.int64, device=self.pages.device)
        self.pages.index_fill_(0, index, 0)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor of zeros that, on the CPU, takes memory only as it is first touched."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes the zeros; the system hands out zeroed memory, page by page as it is first touched.
    cells = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(cells).view(dtype).view(shape)
