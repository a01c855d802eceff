"""The tensors behind KV pages. Which page belongs to whom is the scheduler's business."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from engine.models.config import TransformerConfig


class KVStorage:
    """Keys and values of every layer, each [num_pages, Hkv, page_size, D].

    Zero at first, which keeps slots that nobody may see finite. Once numbers went wrong somewhere
    (`tainted`), pages are cleared when they are handed out: a NaN would spread even from a weight of 0.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
        self.tainted = False
        self.keys = [_zeros(shape, dtype, device) for _ in range(config.num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(config.num_layers)]

    def clear(self, pages: list[int]) -> None:
        index = torch.tensor(pages, dtype=torch.int64, device=self.keys[0].device)
        for layer in (*self.keys, *self.values):
            layer.index_fill_(0, index, 0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes the zeros; the system hands out zeroed memory, page by page as it is first touched.
    cells = np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(cells).view(dtype)
