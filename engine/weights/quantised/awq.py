"""AWQ's layout for matrix products ("gemm"): a word holds eight outputs of one input, in an order of its own.

qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out].
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.weights.quantised.fields import along_columns, chunks, from_groups
from engine.weights.quantised.parts import FLOATING, modules_with, need, part
from engine.weights.source import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine.weights.safetensors import StoredTensor

_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of a word's eight outputs


def awq_recipes(stored: Mapping[str, StoredTensor], group_size: int) -> dict[str, Callable[[], Recipe]]:
    return {
        f"{module}.weight": partial(_recipe, stored, module, group_size)
        for module in modules_with(stored, ".qweight")
    }


def _recipe(stored: Mapping[str, StoredTensor], module: str, group_size: int) -> Recipe:
    weight = part(stored, f"{module}.qweight", "I32")
    need(len(weight.shape) == 2 and weight.num_bytes > 0, weight, "[in, out / 8]")
    inputs, outputs = weight.shape[0], weight.shape[1] * 8
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    zeros = part(stored, f"{module}.qzeros", "I32")
    need(zeros.shape == (groups, weight.shape[1]), zeros, f"{[groups, weight.shape[1]]}")
    scales = part(stored, f"{module}.scales", *FLOATING)
    need(scales.shape == (groups, outputs), scales, f"{[groups, outputs]}")
    return Recipe((outputs, inputs), (weight, zeros, scales), partial(_widen, size))


def _widen(size: int, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    outputs, inputs = out.shape
    words, scales = parts[0].t().contiguous(), parts[2].float().t().contiguous()
    zeros = along_columns(parts[1].t(), _SHIFTS, 4).float()
    group = torch.arange(inputs, device=out.device) // size if inputs % size else None
    for chunk in chunks(outputs, inputs, 8):
        numbers = along_columns(words[chunk.start // 8 : chunk.stop // 8], _SHIFTS, 4)
        out[chunk] = from_groups(numbers, zeros[chunk], scales[chunk], group)
