"""GPTQ's layout: words hold consecutive inputs of one output, zero points and scales go by groups of inputs.

qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out], and
g_idx int32 [in], the group of each input where they were quantised in another order (desc_act). In the
first version of the format zero points are stored less one.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.weights.quantised.fields import along_rows, chunks, from_groups
from engine.weights.quantised.parts import FLOATING, group_of, modules_with, need, part
from engine.weights.source import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine.weights.safetensors import StoredTensor


def gptq_recipes(
    stored: Mapping[str, StoredTensor], bits: int, group_size: int, zeros_less_one: bool
) -> dict[str, Callable[[], Recipe]]:
    """`group_size`: inputs that share a scale; -1: all."""
    return {
        f"{module}.weight": partial(_recipe, stored, module, bits, group_size, zeros_less_one)
        for module in modules_with(stored, ".qweight")
    }


def _recipe(
    stored: Mapping[str, StoredTensor], module: str, bits: int, group_size: int, zeros_less_one: bool
) -> Recipe:
    weight = part(stored, f"{module}.qweight", "I32")
    need(len(weight.shape) == 2 and weight.num_bytes > 0, weight, "[in / words, out]")
    inputs, outputs = weight.shape[0] * 32 // bits, weight.shape[1]
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    scales = part(stored, f"{module}.scales", *FLOATING)
    need(scales.shape == (groups, outputs), scales, f"{[groups, outputs]}")
    zeros = part(stored, f"{module}.qzeros", "I32")
    words = -(-outputs * bits // 32)
    need(zeros.shape == (groups, words), zeros, f"{[groups, words]}")
    parts = [weight, zeros, scales]
    order = stored.get(f"{module}.g_idx")
    if order is not None and order.num_bytes:
        parts.append(part(stored, order.name, "I32"))
        need(order.shape == (inputs,), order, f"[{inputs}]")
    return Recipe((outputs, inputs), tuple(parts), partial(_widen, bits, size, zeros_less_one))


def _widen(
    bits: int, size: int, zeros_less_one: bool, parts: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    outputs, inputs = out.shape
    words, scales = parts[0].t(), parts[2].float().t().contiguous()
    zeros = along_rows(parts[1], bits)[:, :outputs]
    if zeros_less_one:
        zeros = (zeros + 1) & (2**bits - 1)
    zeros = zeros.t().float()
    group = group_of(parts[3], scales.shape[1]) if len(parts) > 3 else None
    if group is None and inputs % size:
        group = torch.arange(inputs, device=out.device) // size
    for chunk in chunks(outputs, inputs):
        out[chunk] = from_groups(along_rows(words[chunk], bits), zeros[chunk], scales[chunk], group)
