"""Weights rounded to the nearest, in the layouts that quantised folders have: for tests and measurements.

Every function takes a float32 matrix [out, in], whose columns groups of 64 divide, and returns the tensors
of its module by their endings. `FORMATS` has the `quantization_config` that goes with each.
"""

from __future__ import annotations

from typing import Any

import torch

GROUP = 64
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(numbers: torch.Tensor, bits: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """int [n, m] -> int32 [n, m * bits / 32]: number order[i] of each word in its i-th field from below."""
    fields = 32 // bits
    words = numbers.long().view(numbers.shape[0], -1, fields)[:, :, list(order or range(fields))]
    shifts = torch.arange(0, 32, bits)
    return (words << shifts).sum(2).to(torch.int32)  # the sum of fields, which wraps into the sign


def int4_packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(2) / 7.5).bfloat16()
    numbers = (groups / scale.float()[:, :, None]).round().clamp(-8, 7) + 8
    return {
        "weight_packed": packed(numbers.flatten(1), 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def int8_rows(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    numbers = (weight / scale.float()).round().clamp(-128, 127)
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}


def fp8_blocks(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = weight
    largest = padded.view(-(-rows // 128), 128, -1, 128).abs().amax((1, 3))
    scale = (largest / 448).clamp(min=1e-12)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return {"weight": (weight / spread).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, zeros, scales = _with_zeros(weight)
    return {
        "qweight": packed(numbers, 4).t(),
        "qzeros": packed((zeros.t() - 1) & 15, 4),
        "scales": scales.t(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, zeros, scales = _with_zeros(weight)
    return {
        "qweight": packed(numbers.t(), 4, _AWQ_ORDER),
        "qzeros": packed(zeros.t(), 4, _AWQ_ORDER),
        "scales": scales.t(),
    }


def _with_zeros(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> numbers of 4 bits [out, in], zero points [out, groups], scales in float16 [out, groups]"""
    groups = weight.view(weight.shape[0], -1, GROUP)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-6).half()
    zeros = (-low / scales.float()).round().clamp(0, 15).long()
    numbers = (groups / scales.float()[:, :, None]).round().long() + zeros[:, :, None]
    return numbers.clamp(0, 15).flatten(1), zeros, scales


def _compressed(form: str, bits: int) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits}}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


FORMATS = {
    "int4 packed": (int4_packed, _compressed("pack-quantized", 4)),
    "int8": (int8_rows, _compressed("int-quantized", 8)),
    "fp8": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "GPTQ 4 bit": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "AWQ 4 bit": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
}


def quantised(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors of a folder with every projection of its layers in the format `name` of FORMATS; the
    others in bfloat16."""
    quantise, _ = FORMATS[name]
    found = {}
    for key, tensor in tensors.items():
        if key.endswith("_proj.weight"):
            parts = quantise(tensor.float())
            found |= {f"{key.removesuffix('weight')}{end}": part.contiguous() for end, part in parts.items()}
        else:
            found[key] = tensor.bfloat16()
    return found
