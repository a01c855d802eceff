"""Integers and scales out of the bytes of blocks: uint8 [num_blocks, block_bytes]."""

from __future__ import annotations

import torch


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block, as float32 [num_blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, b] -> uint8 [n, 2 b]: the low halves of all bytes, then the high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def in_turn(packed: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """uint8 [n, b] -> uint8 [n, b * 8 / bits]: of each run of bytes first all lowest fields, then the next.

    Fields are `bits` wide and of 8 / bits to a byte.
    """
    runs = packed.reshape(packed.shape[0], -1, run)
    return torch.stack([(runs >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=2).flatten(1)
