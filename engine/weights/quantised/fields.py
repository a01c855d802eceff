"""Small unsigned integers that share a byte or a word, and the groups of them that share a scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


def along_columns(words: torch.Tensor, shifts: Sequence[int], bits: int) -> torch.Tensor:
    """int32 [w, n] -> uint8 [w * fields, n]: what lies at `shifts[i]` of a word is its i-th number down."""
    fields = [((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts]
    return torch.stack(fields, dim=1).flatten(0, 1)


def from_groups(
    numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: torch.Tensor | None
) -> torch.Tensor:
    """numbers [n, m], zeros and scales float32 [n, groups] -> (numbers - zeros) * scales, float32 [n, m].

    `group` [m] says each column's; None: groups of equal size, in order.
    """
    values = numbers.float()
    if group is not None:
        return values.sub_(zeros[:, group]).mul_(scales[:, group])
    parts = values.view(*scales.shape, -1)
    parts.sub_(zeros[:, :, None]).mul_(scales[:, :, None])
    return values


def chunks(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of the rows, each a multiple of `multiple` but for the last, of about a million numbers."""
    step = max(1, _CHUNK_WEIGHTS // columns // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
