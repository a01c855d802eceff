"""What the bytes of a stored KV page depend on, beside its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cuda_kernels import ops
from engine.checkpoint import CheckpointKind
from engine.models.kv_groups import kv_groups

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint


def kv_identity(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, page_size: int) -> bytes:
    """Bytes that differ when the files of model or adapter, its shape, the page or the arithmetic differ.

    Files are told apart by name, size and time of change: reading the weights again would delay every
    start. So a file that was only touched costs the cache, and never the right text.
    """
    files = [checkpoint.path]
    if checkpoint.kind == CheckpointKind.FOLDER:  # config.json says how the weights are quantised
        files = [path for name in ("config.json", "*.safetensors") for path in checkpoint.path.glob(name)]
    if checkpoint.adapter is not None:
        files += checkpoint.adapter.glob("adapter_*")
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    arithmetic = (str(dtype), device.type, torch.__version__, ops.ARITHMETIC_VERSION)
    shape = checkpoint.transformer
    return repr((weights, shape, kv_groups(shape), page_size, arithmetic)).encode()
