"""Small unsigned integers that share a byte or a word, and what bounds the memory of widening them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

FIELD_BITS = (2, 4, 8)
_CHUNK_WEIGHTS = 2**20  # bounds the temporaries: a few times 4 MiB


def along_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 or uint8 [n, w] -> uint8 [n, w * fields]: the lowest bits of a word are the first number."""
    # As a vector first: the only row of a transposed matrix is contiguous, and yet has a stride.
    packed = words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)
    if bits == 8:
        return packed
    fields = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=-1).flatten(-2)


def along_columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, w] -> uint8 [n * fields, w]: the lowest bits of a word are the topmost number."""
    fields = [((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in range(0, 32, bits)]
    return torch.stack(fields, dim=1).flatten(0, 1)


def chunks(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of the rows, each a multiple of `multiple` but for the last, of about a million numbers."""
    step = max(1, _CHUNK_WEIGHTS // columns // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
