"""Folders of safetensors files made by a test, and what our sources read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.weights.folder_source import folder_source
from engine.weights.source import WeightSource


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def read(
    folder: Path, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any], name: str
) -> torch.Tensor:
    """The plain tensor `name` of a folder with these stored tensors, in float32."""
    source = folder_source(write(folder, tensors, {"quantization_config": quantisation}))
    return read_one(source, name, torch.float32)


def read_one(source: WeightSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    out = torch.full(source.shape(name), torch.nan, dtype=dtype)
    with source:
        source.read_into(name, out)
    return out
