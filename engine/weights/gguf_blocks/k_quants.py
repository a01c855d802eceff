"""Blocks of 256 weights with scales of their groups, which have a scale in turn: Q2_K to Q6_K."""

from __future__ import annotations

import torch

from engine.weights.gguf_blocks.bits import half, in_turn, nibbles


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = (blocks[:, :16] & 15).float().mul_(half(blocks, 80))
    minima = (blocks[:, :16] >> 4).float().mul_(half(blocks, 82))
    quants = in_turn(blocks[:, 16:80], 32, 2).view(-1, 16, 16).float()
    return quants.mul_(scales[:, :, None]).sub_(minima[:, :, None]).flatten(1)


def q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low = nibbles(blocks[:, 96:104])
    scales = (low | (in_turn(blocks[:, 104:108], 4, 2) << 4)).float() - 32
    scales.mul_(half(blocks, 108))
    # A weight whose high bit is not set is 4 less.
    high = in_turn(blocks[:, :32], 32, 1) << 2
    quants = (in_turn(blocks[:, 32:96], 32, 2) | high).float() - 4
    return quants.view(-1, 16, 16).mul_(scales[:, :, None]).flatten(1)


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _scaled(blocks, in_turn(blocks[:, 16:], 32, 4))


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    fifth = in_turn(blocks[:, 16:48], 32, 1) << 4
    return _scaled(blocks, in_turn(blocks[:, 48:], 32, 4) | fifth)


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high = in_turn(blocks[:, :128], 64, 4), in_turn(blocks[:, 128:192], 32, 2)
    quants = (low | (high << 4)).float() - 32
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(half(blocks, 208))
    return quants.view(-1, 16, 16).mul_(scales[:, :, None]).flatten(1)


def _scaled(blocks: torch.Tensor, quants: torch.Tensor) -> torch.Tensor:
    """Apply the two-level scales and minima of Q4_K and Q5_K to quants, uint8 [n, 256]."""
    scales, minima = _scales_and_mins(blocks[:, 4:16])
    scales.mul_(half(blocks, 0))
    minima.mul_(half(blocks, 2))
    groups = quants.view(-1, 8, 32).float()
    return groups.mul_(scales[:, :, None]).sub_(minima[:, :, None]).flatten(1)


def _scales_and_mins(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [n, 12] -> two of float32 [n, 8]: the 6-bit scales and minima of a block."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return scales.float(), minima.float()
