"""Weights of 8 bits with scales: float8 or int8, one scale for the tensor, a row, a group or a block.

The formats float-quantized, int-quantized and naive-quantized of compressed-tensors, and `fp8`.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch

from engine.weights.quantised.fields import chunks
from engine.weights.quantised.parts import FLOATING, need, part
from engine.weights.source import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine.weights.safetensors import StoredTensor

_NARROW = ("F8_E4M3", "F8_E5M2", "I8")
_SCALES = ("weight_scale", "weight_scale_inv")  # both multiply


def scaled_recipes(
    stored: Mapping[str, StoredTensor], block: tuple[int, int] | None = None
) -> dict[str, Callable[[], Recipe]]:
    """`block`: rows and columns that share a scale, where the last ones may be cut off."""
    found: dict[str, Callable[[], Recipe]] = {}
    for name, tensor in stored.items():
        module = name.removesuffix("weight")
        scale = next((module + suffix for suffix in _SCALES if module + suffix in stored), None)
        if tensor.dtype in _NARROW and name != module and scale is not None:
            found[name] = partial(_recipe, stored, name, scale, block)
    return found


def _recipe(
    stored: Mapping[str, StoredTensor], name: str, scale_name: str, block: tuple[int, int] | None
) -> Recipe:
    weight, scale = stored[name], part(stored, scale_name, *FLOATING)
    need(len(weight.shape) == 2 and weight.num_bytes > 0, weight, "[rows, columns]")
    rows, columns = _block(weight, scale, block)
    zero_name = name.removesuffix("weight") + "weight_zero_point"
    if zero_name not in stored or weight.dtype != "I8":
        return Recipe(weight.shape, (weight, scale), partial(_widen, rows, columns))
    zero = part(stored, zero_name, "I8")
    need(zero.shape == scale.shape, zero, f"that of its scales, {list(scale.shape)}")
    return Recipe(weight.shape, (weight, scale, zero), partial(_widen, rows, columns))


def _block(weight: StoredTensor, scale: StoredTensor, declared: tuple[int, int] | None) -> tuple[int, int]:
    """How many rows and columns one scale is for."""
    rows, columns = weight.shape
    down, across = _matrix(scale.shape)
    need(prod(scale.shape) == down * across, scale, "[rows, columns]")
    if declared and down * across > 1 and (down, across) != (rows, 1):
        expected = (-(-rows // declared[0]), -(-columns // declared[1]))
        need((down, across) == expected, scale, f"{list(expected)}: blocks of {list(declared)}")
        return declared
    fits = down and across and not rows % down and not columns % across
    need(bool(fits), scale, f"one that divides {list(weight.shape)}")
    return rows // down, columns // across


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    padded = (*shape, 1, 1)
    return padded[0], padded[1]


def _widen(rows: int, columns: int, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    weight, scales = parts[0], parts[1].float().view(_matrix(tuple(parts[1].shape)))
    zeros = parts[2].float().view(scales.shape) if len(parts) > 2 else None
    table = _table(weight)
    for chunk in chunks(*out.shape):
        at = torch.arange(chunk.start, chunk.stop, device=out.device) // rows
        values = weight[chunk].float() if table is None else _looked_up(weight[chunk], table)
        if zeros is not None:
            values -= _spread(zeros[at], columns, out.shape[1])
        out[chunk] = values.mul_(_spread(scales[at], columns, out.shape[1]))


def _table(weight: torch.Tensor) -> torch.Tensor | None:
    """The value of each byte, where that is faster: torch converts float8 one by one on a CPU."""
    if weight.dtype == torch.int8:
        return None
    every = torch.arange(256, dtype=torch.uint8, device=weight.device)
    return every.view(weight.dtype).float()


def _looked_up(numbers: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    codes = numbers.view(torch.uint8).reshape(-1).int()
    return table.index_select(0, codes).view(numbers.shape)


def _spread(scales: torch.Tensor, columns: int, width: int) -> torch.Tensor:
    """[n, s] -> [n, width], or [n, 1] where there is but one scale for a row"""
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(columns, dim=1)[:, :width]
