"""What the bytes of a stored KV page depend on, beside its key."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from cuda_kernels import ops
from engine.models.kv_groups import kv_groups

if TYPE_CHECKING:
    from engine.models.config import TransformerConfig

_DIGEST_BYTES: Final = 32
# By these people choose other instructions, and so other orders of sums, than the CPU's kind says.
_INSTRUCTION_VARIABLES: Final = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "OPENBLAS_CORETYPE",
)  # fmt: skip


def kv_identity(
    weights: bytes,
    shape: TransformerConfig,
    kernels: ops.Operations,
    dtype: torch.dtype,
    device: torch.device,
    page_size: int,
) -> bytes:
    """Bytes that differ when the weights (by their digest), their shape, page or arithmetic differ."""
    names = tuple(_name(getattr(kernels, field.name)) for field in fields(kernels))
    arithmetic = (ops.ARITHMETIC_VERSION, names, str(dtype), torch.__version__, _machine(device))
    described = repr((weights, shape, kv_groups(shape), page_size, arithmetic))
    return hashlib.blake2b(described.encode(), digest_size=_DIGEST_BYTES).digest()


def device_name(device: torch.device) -> str:
    """For people too: which GPU, or which CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return platform.machine()
    named = (line for line in lines if line.startswith(("model name", "CPU part")))
    return next(named, platform.machine())


def _machine(device: torch.device) -> tuple[object, ...]:
    """Libraries choose their kernels by the kind of device, and on a CPU share sums out among threads."""
    if device.type == "cuda":
        kind: tuple[object, ...] = (torch.cuda.get_device_capability(device), torch.version.cuda)
    else:
        chosen = tuple(os.environ.get(name) for name in _INSTRUCTION_VARIABLES)
        level, able = torch.backends.cpu.get_cpu_capability(), sorted(torch.cpu.get_capabilities().items())
        kind = (level, able, chosen, torch.get_num_threads())
    return device.type, device_name(device), kind


def _name(part: object) -> str:
    """A function or a class by where it is defined, a number as it is."""
    return f"{getattr(part, '__module__', '')}.{getattr(part, '__qualname__', part)}"
