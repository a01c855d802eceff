"""From a checkpoint's files to the tensors of the model: allocated once, each filled by its pieces."""

from __future__ import annotations

import gc
import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine.checkpoint import Checkpoint, CheckpointError, CheckpointKind
from engine.weights.adapter import Adapter
from engine.weights.checksum import verified
from engine.weights.filling import Filling
from engine.weights.folder_source import folder_source
from engine.weights.gguf_source import gguf_source
from engine.weights.layout_folder import folder_targets
from engine.weights.layout_gguf import gguf_targets
from engine.weights.leftovers import as_stored, left_unread

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from engine.weights.layout import Target
    from engine.weights.source import WeightSource

logger = logging.getLogger("octavo.engine")


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    free_bytes: int | None = None,
    num_cores: int = 0,
) -> dict[str, torch.Tensor]:
    """Runtime name -> tensor on `device`: of `dtype`, or of float32 where the layout asks for that.

    Names, shapes, types and, where given, the device's `free_bytes` are checked before anything is read.
    Raises CheckpointError, in one line, for what is missing, has another shape or an unsupported type, or
    does not fit; and when the file is not the one whose SHA-256 the checkpoint promises. `num_cores`: 0 where
    torch's number of threads says it.
    """
    started = time.perf_counter()
    with _no_garbage_collection():
        filling, targets, notes = _plan(checkpoint, dtype, device, free_bytes, num_cores)
        for note in notes:
            logger.warning("%s: %s", checkpoint.path, note)
        with verified(checkpoint):
            weights = filling.run(targets)
    _log(checkpoint, filling, weights, time.perf_counter() - started)
    return weights


def check_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, free_bytes: int
) -> tuple[str, int]:
    """What `load_weights` would raise before it reads anything; else the format that the weights are stored
    in, for people, and the bytes that they would take."""
    filling, targets, _ = _plan(checkpoint, dtype, device, free_bytes)
    return filling.source.format_name, filling.kept_bytes(targets)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """One in the midst of it looks at all of torch's objects: 0.1 s, a fifth of a small model's load."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _plan(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    free_bytes: int | None,
    num_cores: int = 0,
) -> tuple[Filling, list[Target], list[str]]:
    """Read the headers, and check everything that can be checked by them; with what people should know."""
    source = _source(checkpoint)
    layout = folder_targets if checkpoint.kind is CheckpointKind.FOLDER else gguf_targets
    try:
        shape, notes = as_stored(checkpoint.transformer, source, layout)
        targets = [_checked(checkpoint, source, target) for target in layout(shape, source.names)]
        notes += left_unread(shape, source, targets)
    except CheckpointError as error:
        raise _named(checkpoint, error) from error
    adapter = Adapter(checkpoint.adapter) if checkpoint.adapter else None
    if adapter is not None:
        adapter.check(targets)
    filling = Filling(source, dtype, device, adapter, num_cores)
    if free_bytes is not None:
        _check_memory(checkpoint, filling, targets, free_bytes)
    return filling, targets, notes


def _named(checkpoint: Checkpoint, error: CheckpointError) -> CheckpointError:
    """With the file in its line."""
    where = str(checkpoint.path)
    return error if where in str(error) else CheckpointError(f"{where}: {error}")


def _source(checkpoint: Checkpoint) -> WeightSource:
    if checkpoint.kind is CheckpointKind.FOLDER:
        return folder_source(checkpoint.path)
    assert checkpoint.gguf is not None, "a GGUF checkpoint carries its parsed header"
    return gguf_source(checkpoint.gguf)


def _checked(checkpoint: Checkpoint, source: WeightSource, target: Target) -> Target:
    for piece in target.pieces:
        if piece.stored not in source.names:
            raise CheckpointError(f"{checkpoint.path}: tensor '{piece.stored}' is missing")
        shape = source.shape(piece.stored)
        if shape != piece.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor '{piece.stored}' has shape {list(shape)}, "
                f"but the configuration needs {list(piece.shape)}"
            )
    return target


def _check_memory(checkpoint: Checkpoint, filling: Filling, targets: list[Target], free_bytes: int) -> None:
    needed = filling.peak_bytes(targets)
    if needed > free_bytes:
        kind = str(filling.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{checkpoint.path}: loading takes {needed} bytes as {kind} on {filling.device}, {free_bytes} "
            f"are free: take a smaller model, a dtype of two bytes, or free memory"
        )


def _log(checkpoint: Checkpoint, filling: Filling, weights: dict[str, torch.Tensor], seconds: float) -> None:
    if filling.source.quantised_activations:
        logger.info("%s: activations are computed in full, not quantised", filling.source.format_name)
    if checkpoint.adapter and filling.adapter:
        logger.info("merged %s into %d modules", checkpoint.adapter, filling.adapter.num_modules)
    kept = sum(tensor.nbytes for tensor in weights.values())
    logger.info(
        "loaded %s (%s, %.1f MB) in %.2f s: %.1f MB of weights as %s on %s",
        checkpoint.name,
        filling.source.format_name,
        checkpoint.size_bytes / 1e6,
        seconds,
        kept / 1e6,
        str(filling.dtype).removeprefix("torch."),
        filling.device,
    )
