"""Blocks whose 4-bit codes stand for the entries of a table: IQ4_NL, IQ4_XS, MXFP4."""

from __future__ import annotations

import torch

from engine.weights.gguf_blocks.bits import half, in_turn, nibbles

_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _looked_up(nibbles(blocks[:, 2:]), _NON_LINEAR).mul_(half(blocks, 0))


def iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    high, low = blocks[:, 2:4], blocks[:, 4:8]
    # Eight groups: four low bits each, in pairs of neighbours; two high bits each, in order.
    low = torch.stack((low & 15, low >> 4), dim=2).flatten(1)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=blocks.device)
    high = ((high[:, :, None] >> shifts) & 3).flatten(1)
    scales = ((low | (high << 4)).float() - 32).mul_(half(blocks, 0))
    values = _looked_up(in_turn(blocks[:, 8:], 16, 4), _NON_LINEAR)
    return values.view(-1, 8, 32).mul_(scales[:, :, None]).flatten(1)


def mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """The scale is a power of two, halved here, as the table has doubled values."""
    exponent = blocks[:, :1].int()
    tiny = torch.bitwise_left_shift(torch.full_like(exponent, 0x00200000), exponent.clamp(max=1))
    bits = torch.where(exponent < 2, tiny, (exponent - 1) << 23)
    return _looked_up(nibbles(blocks[:, 1:]), _E2M1_DOUBLED).mul_(bits.view(torch.float32))


def _looked_up(codes: torch.Tensor, values: tuple[int, ...]) -> torch.Tensor:
    """uint8 of any shape -> float32 of that shape"""
    table = torch.tensor(values, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
