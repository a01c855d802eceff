"""Blocks of 32 weights with one scale, and possibly one minimum: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0."""

from __future__ import annotations

import torch

from engine.weights.gguf_blocks.bits import half, nibbles


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return (nibbles(blocks[:, 2:]).float() - 8).mul_(half(blocks, 0))


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return nibbles(blocks[:, 4:]).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q5_0(blocks: torch.Tensor) -> torch.Tensor:
    quants = nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (quants.float() - 16).mul_(half(blocks, 0))


def q5_1(blocks: torch.Tensor) -> torch.Tensor:
    quants = nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return quants.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4] -> uint8 [n, 32]: bit i of the word, at the place of the fifth bit of weight i."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed[:, :, None] >> shifts) & 1) << 4).view(-1, 32)
