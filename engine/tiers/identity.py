"""What the bytes of a stored KV page depend on, beside its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cuda_kernels import ops
from engine.checkpoint import CheckpointKind
from engine.models.kv_groups import kv_groups
from engine.weights.safetensors import INDEX

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint


def kv_identity(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, page_size: int) -> bytes:
    """Bytes that differ when the files of model or adapter, its shape, the page or the arithmetic differ.

    Files are told apart by name, size and time of change: reading the weights again would delay every
    start. So a file that was only touched costs the cache, and never the right text.
    """
    files = [checkpoint.path]
    if checkpoint.kind == CheckpointKind.FOLDER:  # config.json says how the weights are quantised
        names = ("config.json", INDEX, "*.safetensors")
        files = [path for name in names for path in checkpoint.path.glob(name)]
    if checkpoint.adapter is not None:
        files += checkpoint.adapter.glob("adapter_*")
    states = [(file.name, file.stat()) for file in sorted(files) if file.is_file()]  # not a link to nothing
    weights = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    arithmetic = (str(dtype), device.type, torch.__version__, ops.ARITHMETIC_VERSION)
    shape = checkpoint.transformer
    return repr((weights, shape, kv_groups(shape), page_size, arithmetic)).encode()
