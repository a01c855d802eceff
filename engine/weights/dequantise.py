"""Blocks of quantised weights, as GGUF stores them, widened to plain tensors.

A block is a few bytes of scales and the packed integers of 32 or 256 weights. Every function here
takes the raw blocks as uint8 [num_blocks, block_bytes] and returns float32 [num_blocks, block_size],
computed in float32 in the order of ggml's own reference, so that results are equal to the last bit.
Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.weights.gguf import BlockType

_CHUNK_WEIGHTS = 2**20  # bounds the temporaries: a few times 4 MiB
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def can_dequantise(kind: BlockType) -> bool:
    return kind.name in _PLAIN or kind.name in _BLOCKS


def dequantise(raw: torch.Tensor, kind: BlockType, out: torch.Tensor) -> None:
    """Widen `raw`, uint8 [num_blocks * block_bytes], into `out`, [num_weights] of any floating type.

    Both lie on one device. Raises KeyError for a type that `can_dequantise` denies.
    """
    if kind.name in _PLAIN:
        out.copy_(raw.view(_PLAIN[kind.name]))
        return
    widen = _BLOCKS[kind.name]
    blocks, rows = raw.view(-1, kind.block_bytes), out.view(-1, kind.block_size)
    step = _CHUNK_WEIGHTS // kind.block_size
    for start in range(0, blocks.shape[0], step):
        rows[start : start + step] = widen(blocks[start : start + step])


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block, as float32 [num_blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, b] -> uint8 [n, 2 b]: the low halves of all bytes, then the high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4] -> uint8 [n, 32]: bit i of the word, at the place of the fifth bit of weight i."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed[:, :, None] >> shifts) & 1) << 4).view(-1, 32)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (quants.float() - 16).mul_(_half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return quants.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _scales_and_mins(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [n, 12] -> two of float32 [n, 8]: the 6-bit scales and minima of a k-quant block."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return scales.float(), minima.float()


def _scaled(blocks: torch.Tensor, quants: torch.Tensor) -> torch.Tensor:
    """Apply the two-level scales and minima of Q4_K and Q5_K to quants, uint8 [n, 8, 32]."""
    scales, minima = _scales_and_mins(blocks[:, 4:16])
    scales.mul_(_half(blocks, 0))
    minima.mul_(_half(blocks, 2))
    return quants.float().mul_(scales[:, :, None]).sub_(minima[:, :, None]).flatten(1)


def _k_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 128] -> uint8 [n, 8, 32]: each run of 32 bytes holds two groups, low then high."""
    runs = packed.reshape(-1, 4, 1, 32)
    return torch.cat((runs & 15, runs >> 4), dim=2).view(-1, 8, 32)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _scaled(blocks, _k_nibbles(blocks[:, 16:]))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    groups = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = ((blocks[:, None, 16:48] >> groups) & 1) << 4
    return _scaled(blocks, _k_nibbles(blocks[:, 48:]) | fifth)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=blocks.device)[:, None]
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), dim=2).view(-1, 8, 32)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).view(-1, 8, 32)
    quants = (low | (high << 4)).float() - 32
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return quants.view(-1, 16, 16).mul_(scales[:, :, None]).flatten(1)


_BLOCKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
