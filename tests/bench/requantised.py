"""The default model's weights stored in other formats, by rounding to nearest: files for `perplexity`.

Nothing is calibrated, so that the figures are of the formats and not of somebody's data. Weights of layers
and embedding are rounded in GGUF files, those of layers alone in folders, as their makers do it.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.engine.weights.test_quantised import compressed, pack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Stored = dict[str, np.ndarray | torch.Tensor]

GROUP = 32  # weights of a row that share a scale
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FLOAT8_MAX = 448.0


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """`source` again, with its matrices stored as `kind`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    stored_as = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if plain.ndim == 1:
            writer.add_tensor(tensor.name, plain)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(plain, stored_as), raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder_as(source: Path, target: Path, kind: str) -> None:
    """The folder `source`, whose weights are float32, with the layers' matrices stored as `kind`."""
    config, store = FOLDER_KINDS[kind]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((target / "config.json").read_text(encoding="utf-8"))
    settings |= {"quantization_config": config} if config else {}
    (target / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        is_matrix = "_proj.weight" in name
        parts: Stored = store(weight) if is_matrix or not config else {"weight": weight}
        for part, values in parts.items():
            tensor = (
                values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
            )
            stored[f"{name.removesuffix('weight')}{part}"] = tensor.contiguous()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})


def _int8(weight: torch.Tensor) -> Stored:
    """One scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _float8(weight: torch.Tensor) -> Stored:
    scale = weight.abs().amax(1, keepdim=True) / FLOAT8_MAX
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _int4(weight: torch.Tensor) -> Stored:
    """Symmetric groups: numbers 0 to 15 around 8."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = groups.abs().amax(2) / 7
    numbers = (groups / scale[..., None]).round().clamp(-8, 7) + 8
    shape = torch.tensor(weight.shape)
    packed = pack(numbers.reshape(weight.shape).numpy().astype(np.uint32), 4)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}


def _with_zeros(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Groups from their least to their largest -> numbers [in, out], zeros and scales [groups, out]."""
    groups = weight.T.reshape(-1, GROUP, len(weight))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale).round().clamp(0, 15)
    numbers = ((groups / scale[:, None]).round() + zero[:, None]).clamp(0, 15)
    as_numbers = numbers.reshape(weight.T.shape).numpy().astype(np.uint32)
    return as_numbers, zero.numpy().astype(np.uint32), scale


def _gptq(weight: torch.Tensor) -> Stored:
    numbers, zero, scale = _with_zeros(weight)
    return {"qweight": pack(numbers.T, 4).T, "qzeros": pack((zero - 1) % 16, 4), "scales": scale}


def _awq(weight: torch.Tensor) -> Stored:
    numbers, zero, scale = _with_zeros(weight)
    return {"qweight": pack(numbers, 4, AWQ_ORDER), "qzeros": pack(zero, 4, AWQ_ORDER), "scales": scale}


_INT8 = compressed(8, "int-quantized", strategy="channel", symmetric=True)
_FLOAT8 = compressed(8, "float-quantized", strategy="channel", symmetric=True)
_INT4 = compressed(4, strategy="group", group_size=GROUP, symmetric=True)
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GGUF_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4")
FOLDER_KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Stored]]] = {
    "F16": ({}, lambda weight: {"weight": weight.half()}),
    "BF16": ({}, lambda weight: {"weight": weight.bfloat16()}),
    "compressed-tensors int8": (_INT8, _int8),
    "compressed-tensors fp8": (_FLOAT8, _float8),
    "compressed-tensors int4": (_INT4, _int4),
    "GPTQ 4 bit": (_GPTQ, _gptq),
    "AWQ 4 bit": (_AWQ, _awq),
}
