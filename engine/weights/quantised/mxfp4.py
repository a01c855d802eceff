"""The experts of GPT-OSS: 4-bit floats in blocks of 32 that share a power of two.

X_blocks uint8 [E, out, groups, 16], two numbers to a byte, low half first; X_scales uint8 [E, out, groups],
exponents that are 127 too large. Together they are the plain tensor X [E, groups * 32, out].
Format: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.weights.quantised.fields import chunks
from engine.weights.quantised.float4 import e2m1
from engine.weights.quantised.parts import modules_with, need, part
from engine.weights.source import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine.weights.safetensors import StoredTensor


def mxfp4_recipes(stored: Mapping[str, StoredTensor]) -> dict[str, Callable[[], Recipe]]:
    return {name: partial(_recipe, stored, name) for name in modules_with(stored, "_blocks")}


def _recipe(stored: Mapping[str, StoredTensor], name: str) -> Recipe:
    blocks = part(stored, f"{name}_blocks", "U8")
    sound = len(blocks.shape) == 4 and blocks.shape[3] == 16 and blocks.num_bytes > 0
    need(sound, blocks, "[experts, out, groups, 16]")
    scales = part(stored, f"{name}_scales", "U8", "F8_E8M0")
    need(scales.shape == blocks.shape[:3], scales, f"{list(blocks.shape[:3])}")
    experts, outputs, groups, _ = blocks.shape
    return Recipe((experts, groups * 32, outputs), (blocks, scales), _widen, transposed=True)


def _widen(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    blocks, scales = parts[0], parts[1].view(torch.float8_e8m0fnu)
    matrices = out.transpose(1, 2)  # as they are stored, and as `out` lies in memory if it can
    _, outputs, inputs = matrices.shape
    for expert in range(out.shape[0]):
        for chunk in chunks(outputs, inputs):
            values = e2m1(blocks[expert, chunk].flatten(1)).view(-1, scales.shape[2], 32)
            values *= scales[expert, chunk, :, None].float()
            matrices[expert, chunk] = values.flatten(1)
