"""What a checkpoint is, and what serving it on this machine would come to, without reading its weights.

The description needs no torch; the trial does, which asks the engine's own rules.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from engine.checkpoint import Checkpoint, CheckpointError, CheckpointKind
from engine.models.context import for_context
from engine.models.kv_groups import kv_spans, page_values
from engine.weights.layout_folder import folder_targets
from engine.weights.layout_gguf import gguf_targets
from engine.weights.paths import named_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.config import EngineConfig
    from engine.models.config import TransformerConfig
    from engine.weights.layout import Target

KV_ITEM_BYTES = 2  # bfloat16, the default where the device has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    architecture: str
    num_layers: int
    hidden_size: int
    num_parameters: int
    num_active_parameters: int  # for one token: fewer where it chooses among experts
    num_experts: int
    experts_per_token: int
    stored_bytes: int
    vocab_size: int
    max_positions: int
    windows: tuple[tuple[int, int], ...]  # (tokens that a layer sees, layers), of those that do not see all
    chunks: tuple[tuple[int, int], ...]
    num_layers_without_positions: int
    rope_scaling: str  # kind and factor, "" where there is none
    kv_bytes_per_token: int  # in two bytes a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the engine would have, had it just loaded the weights."""

    device: str
    dtype: str
    weight_format: str
    weight_bytes: int  # as they are computed with
    free_bytes: int  # before
    max_model_len: int
    kv_bytes: int  # of all pages
    kv_tokens: int  # that the pages hold, each in every layer
    full_sequences: int  # of max_model_len tokens, at a time


def describe(checkpoint: Checkpoint) -> Description:
    """Facts of the configuration; the tensors are those that it needs, present or not."""
    shape = checkpoint.transformer
    experts = shape.experts
    scaling = next((layer.rope.scaling for layer in shape.layers if layer.rope and layer.rope.scaling), None)
    return Description(
        architecture=shape.architecture,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_parameters=sum(prod(target.shape) for target in _targets(checkpoint)),
        num_active_parameters=sum(_active(shape, target) for target in _targets(checkpoint)),
        num_experts=experts.count if experts else 0,
        experts_per_token=experts.per_token if experts else 0,
        stored_bytes=checkpoint.size_bytes,
        vocab_size=shape.vocab_size,
        max_positions=shape.max_positions,
        windows=tuple(sorted(Counter(layer.window for layer in shape.layers if layer.window).items())),
        chunks=tuple(sorted(Counter(layer.chunk for layer in shape.layers if layer.chunk).items())),
        num_layers_without_positions=sum(layer.rope is None for layer in shape.layers),
        rope_scaling="" if scaling is None else f"{scaling.kind} x{scaling.factor:g}",
        kv_bytes_per_token=shape.kv_values_per_token * KV_ITEM_BYTES,
    )


def try_out(config: EngineConfig, checkpoint: Checkpoint) -> Trial:
    """Everything that the engine checks before it reads weights. Raises CheckpointError, with its line."""
    import torch

    from engine import sizing
    from engine.step_memory import asked_bytes, counted_bytes
    from engine.weights.loader import check_weights

    try:
        device = sizing.choose_device(config.device)
        dtype = sizing.choose_dtype(config.dtype, device)
        max_model_len = sizing.served_len(config, checkpoint)
        shape = for_context(checkpoint.transformer, max_model_len)
        adapter = named_path(config.lora, "lora") if config.lora else None
        checkpoint = replace(checkpoint, transformer=shape, adapter=adapter)
        free = sizing.free_bytes(device)
        stored_as, weight_bytes = check_weights(checkpoint, dtype, device, free)
        step_bytes = asked_bytes(shape, config.scheduler)
        step_bytes += counted_bytes(shape, dtype.itemsize, config.scheduler)
        config = sizing.with_draft_stores(config)
        left = free - weight_bytes
        fitting = min(int(left * sizing.memory_share(device)), left - step_bytes - config.draft_store_bytes)
        config = replace(config, kv_cache_bytes=config.kv_cache_bytes or max(1, fitting))
        settings = sizing.with_pages(config, checkpoint, dtype, device, max_model_len, step_bytes)
    except sizing.EngineConfigError as error:
        raise CheckpointError(str(error)) from None
    spans = kv_spans(shape, settings.page_size)
    num_pages, item_bytes = settings.num_pages, torch.empty((), dtype=dtype).itemsize
    full = spans.longest(num_pages, settings.max_num_batched_tokens, max_model_len)
    return Trial(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        weight_format=stored_as,
        weight_bytes=weight_bytes,
        free_bytes=free,
        max_model_len=full,
        kv_bytes=num_pages * page_values(shape, settings.page_size) * item_bytes,
        kv_tokens=num_pages // spans.num_groups * settings.page_size,
        full_sequences=num_pages // spans.most_pages(full, 1),
    )


def _targets(checkpoint: Checkpoint) -> Iterator[Target]:
    if checkpoint.kind is CheckpointKind.FOLDER:
        return folder_targets(checkpoint.transformer, ())
    return gguf_targets(checkpoint.transformer, ())


def _active(shape: TransformerConfig, target: Target) -> int:
    size = prod(target.shape)
    if shape.experts is None or ".experts." not in target.name:
        return size
    return size // shape.experts.count * shape.experts.per_token
