"""Matrices of 4-bit floats, as compressed-tensors packs them: nvfp4-pack-quantized, mxfp4-pack-quantized.

weight_packed uint8 [out, in / 2], two numbers to a byte, low half first; weight_scale [out, groups], of
float8_e4m3fn with one weight_global_scale that divides (NVFP4), or powers of two alone (MXFP4).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.weights.quantised.fields import along_rows, chunks
from engine.weights.quantised.parts import modules_with, need, part
from engine.weights.source import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine.weights.safetensors import StoredTensor

_PACKED = ".weight_packed"


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, b], two numbers to a byte: sign, two bits of exponent, one of mantissa -> float32 [n, 2 b]

    In the places that a float16 has for them they are the number times 2^-14, small ones included.
    """
    codes = along_rows(packed, 4).to(torch.int16)
    bits = ((codes & 8) << 12) | ((codes & 7) << 9)
    return bits.view(torch.float16).float().mul_(2.0**14)


def float4_recipes(stored: Mapping[str, StoredTensor]) -> dict[str, Callable[[], Recipe]]:
    return {
        f"{module}.weight": partial(_recipe, stored, module)
        for module in modules_with(stored, _PACKED)
        if stored[module + _PACKED].dtype == "U8"
    }


def _recipe(stored: Mapping[str, StoredTensor], module: str) -> Recipe:
    packed = stored[module + _PACKED]
    need(len(packed.shape) == 2 and packed.num_bytes > 0, packed, "[out, in / 2]")
    rows, columns = packed.shape[0], packed.shape[1] * 2
    scale = part(stored, f"{module}.weight_scale", "F8_E4M3", "F8_E8M0", "U8")
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    need(scale.shape == (rows, groups) and groups > 0 and not columns % groups, scale, f"[{rows}, groups]")
    if scale.dtype != "F8_E4M3":
        return Recipe((rows, columns), (packed, scale), _widen)
    whole = part(stored, f"{module}.weight_global_scale", "F32")
    need(whole.shape in ((), (1,)), whole, "[1]")
    return Recipe((rows, columns), (packed, scale, whole), _widen)


def _widen(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    stored = parts[1].view(torch.float8_e8m0fnu) if parts[1].dtype == torch.uint8 else parts[1]
    scales = stored.float()
    if len(parts) > 2:
        scales /= parts[2]
    for chunk in chunks(*out.shape):
        values = e2m1(parts[0][chunk])
        groups = values.view(*scales[chunk].shape, -1)
        out[chunk] = groups.mul_(scales[chunk][:, :, None]).view(values.shape)
