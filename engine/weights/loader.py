"""From a checkpoint's files to the tensors of the model: named, shaped and typed as it expects them."""

from __future__ import annotations

import hashlib
import mmap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from engine.checkpoint import Checkpoint, CheckpointError, CheckpointKind
from engine.weights.dequantise import can_dequantise, dequantise
from engine.weights.names import expected_shapes, gguf_name
from engine.weights.safetensors import SafetensorsFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from engine.models.config import TransformerConfig
    from engine.weights.gguf import GGUFFile, TensorInfo
    from engine.weights.names import Shape

_HASH_CHUNK_BYTES = 2**22
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Canonical name -> tensor of `dtype` on `device`; `lm_head.weight` only when it is not tied.

    Raises CheckpointError, in one line that names the tensor, when one is missing, has another shape or
    a type that is not supported; or when the file is not the one whose SHA-256 the checkpoint promises.
    """
    if checkpoint.kind is CheckpointKind.FOLDER:
        return _load_folder(checkpoint, dtype, device)
    return _load_gguf(checkpoint, dtype, device)


def _load_folder(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    source = SafetensorsFolder(checkpoint.path)
    weights = {}
    for name, shape in expected_shapes(checkpoint.transformer):
        if name not in source.file_of:
            raise _missing(checkpoint, name)
        stored = source.read(name)
        _check_shape(checkpoint, name, tuple(stored.shape), shape)
        if stored.dtype not in _FLOATING:
            raise CheckpointError(f"{checkpoint.path}: tensor '{name}' has the type {stored.dtype}")
        weights[name] = stored.to(device=device, dtype=dtype, copy=True)
    return weights


def _load_gguf(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    file, config = checkpoint.gguf, checkpoint.transformer
    assert file is not None, "a GGUF checkpoint carries its parsed header"
    places = {name: _place(checkpoint, file, name, shape) for name, shape in expected_shapes(config)}

    def load(name: str, info: TensorInfo) -> torch.Tensor:
        raw = torch.frombuffer(data, dtype=torch.uint8, count=info.num_bytes, offset=info.offset)
        raw = _half_split_order(raw.to(device), info, name, config)
        return dequantise(raw, info.type, dtype).view(info.shape)

    with _mapped(file) as data, _verified(checkpoint, data), _whole_tensors_in_parallel() as pool:
        return dict(zip(places, pool.map(load, places.keys(), places.values()), strict=True))


def _place(checkpoint: Checkpoint, file: GGUFFile, name: str, shape: Shape) -> TensorInfo:
    """Where the tensor lies, checked against what the model expects."""
    info = file.tensors.get(gguf_name(name))
    if info is None:
        raise _missing(checkpoint, name, gguf_name(name))
    _check_shape(checkpoint, info.name, info.shape, shape)
    if not can_dequantise(info.type):
        raise CheckpointError(
            f"{checkpoint.path}: tensor '{info.name}' has the type {info.type.name}, which is not supported"
        )
    return info


@contextmanager
def _whole_tensors_in_parallel() -> Iterator[ThreadPoolExecutor]:
    """Each thread has tensors of its own, and no operation is spread over threads: widening is thousands
    of short operations, and where another process holds a core (the server starts at the same time) each
    of them would wait for its other half. One core is left to that process and to the hash.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, num_threads - 1), thread_name_prefix="weights") as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)


def _half_split_order(
    raw: torch.Tensor, info: TensorInfo, name: str, config: TransformerConfig
) -> torch.Tensor:
    """Undo GGUF's order of query and key rows, in which the two of a rotary pair are neighbours.

    Rows move whole, so this works on the stored bytes: within each head, row 2 i + half becomes row
    half * head_dim / 2 + i.
    """
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return raw
    pairs = raw.view(heads, config.head_dim // 2, 2, info.num_bytes // info.shape[0])
    return pairs.transpose(1, 2).reshape(-1)


@contextmanager
def _mapped(file: GGUFFile) -> Iterator[mmap.mmap]:
    """The file's bytes, private and so writable, as torch wants its buffers."""
    with file.path.open("rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    if len(data) != file.size_bytes:
        raise CheckpointError(f"{file.path}: had {file.size_bytes} bytes, now {len(data)}")
    try:
        yield data
    finally:
        with suppress(BufferError):  # after a failure a tensor may still look at it; it goes with the last
            data.close()


@contextmanager
def _verified(checkpoint: Checkpoint, data: mmap.mmap) -> Iterator[None]:
    """Hash the file in a thread beside the loading, which hardly feels it: hashlib drops the lock."""
    if checkpoint.sha256 is None:
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        found: Future[str] = pool.submit(_sha256, data)
        yield
        if found.result() != checkpoint.sha256:
            raise CheckpointError(f"{checkpoint.path}: SHA-256 is {found.result()}, not {checkpoint.sha256}")


def _sha256(data: mmap.mmap) -> str:
    digest = hashlib.sha256()
    with memoryview(data) as view:
        for start in range(0, len(view), _HASH_CHUNK_BYTES):
            digest.update(view[start : start + _HASH_CHUNK_BYTES])
    return digest.hexdigest()


def _check_shape(checkpoint: Checkpoint, name: str, found: Shape, wanted: Shape) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{checkpoint.path}: tensor '{name}' has shape {list(found)}, "
            f"but the configuration needs {list(wanted)}"
        )


def _missing(checkpoint: Checkpoint, *names: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.path}: tensor {' or '.join(map(repr, names))} is missing")
