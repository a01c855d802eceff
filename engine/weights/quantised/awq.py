"""AWQ's layout for matrix products ("gemm"): a word holds eight outputs of one input, in an order of its own.

qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out].
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.weights.quantised.fields import along_rows, chunks
from engine.weights.quantised.parts import FLOATING, modules_with, need, part
from engine.weights.source import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine.weights.safetensors import StoredTensor

_PLACE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


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
    zeros, scales = _in_order(parts[1]), parts[2].float()
    outputs, inputs = out.shape
    for chunk in chunks(inputs, outputs):
        group = torch.arange(chunk.start, chunk.stop, device=out.device) // size
        out[:, chunk] = ((_in_order(parts[0][chunk]) - zeros[group]) * scales[group]).T


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, w] -> float32 [n, 8 w]"""
    fields = along_rows(words, 4).view(words.shape[0], -1, 8)
    return fields[:, :, list(_PLACE_OF_OUTPUT)].flatten(1).float()
