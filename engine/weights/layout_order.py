"""Orders in which checkpoints keep rows, brought into the one that the kernels read. Torch only by method."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def pairs_to_halves(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The two of a rotary pair are neighbours -> they lie half a head apart.

    For [heads * D] or [heads * D, in]: within each head, row 2 i + half becomes row half * D / 2 + i.
    """

    def arrange(stored: torch.Tensor) -> torch.Tensor:
        size = stored.shape[0] // heads
        pairs = stored.reshape(heads, size // 2, 2, *stored.shape[1:])
        return pairs.transpose(1, 2).reshape(stored.shape)

    return arrange


def columns_to_rows(stored: torch.Tensor) -> torch.Tensor:
    """[E, in, out] -> [E, out, in]"""
    return stored.transpose(1, 2)


def alternating_columns_to_rows(stored: torch.Tensor) -> torch.Tensor:
    """GPT-OSS's [E, in, 2 I], gate and up by turns -> [E, 2 I, in], gate first"""
    return alternating_to_halves(stored.transpose(1, 2))


def alternating_to_halves(stored: torch.Tensor) -> torch.Tensor:
    """[E, 2 I, ...], gate and up by turns -> gate first"""
    count, rows = stored.shape[:2]
    turns = stored.reshape(count, rows // 2, 2, *stored.shape[2:])
    return turns.transpose(1, 2).reshape(stored.shape)
