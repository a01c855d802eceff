"""Blocks of 256 weights that are -1, 0 or 1 times a scale: TQ1_0 (five to a byte), TQ2_0 (four to a byte)."""

from __future__ import annotations

import torch

from engine.weights.gguf_blocks.bits import half, in_turn


def tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    digits = (_digits(blocks[:, :32], 5), _digits(blocks[:, 32:48], 5), _digits(blocks[:, 48:52], 4))
    return torch.cat(digits, dim=1).sub_(1).mul_(half(blocks, 52))


def tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    return in_turn(blocks[:, :64], 32, 2).float().sub_(1).mul_(half(blocks, 64))


def _digits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """uint8 [n, b] -> float32 [n, count * b]: base-3 digits of fractions of 256, the first ones first."""
    powers = torch.tensor([3**place for place in range(count)], dtype=torch.uint8, device=packed.device)
    rest = packed[:, None, :] * powers[:, None]  # in 8 bits: the digits before fall out at the top
    return ((rest.short() * 3) >> 8).flatten(1).float()
