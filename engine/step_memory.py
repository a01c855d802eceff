"""What the largest step takes of the memory beside weights and pages: on a GPU one is computed, and keeps
what it took; on a CPU it is counted, as a step of that size would hold up the first token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from engine.batch import BatchBuilder
from engine.calibration import StepStopwatch
from engine.drafting.speculation import MAX_GUESSED
from engine.kv_storage import KVStorage
from engine.models.kv_groups import kv_groups
from engine.sampling.sampler import rows_of_piece
from engine.sizing import EngineConfigError, free_bytes

if TYPE_CHECKING:
    from engine.calibration import Slices
    from engine.models.config import TransformerConfig
    from engine.models.transformer import Transformer
    from scheduler.config import SchedulerConfig

# Numbers of float32 for each logit of a piece that is sampled (processed, after the temperature, with noise:
# measured, 4) or scored.
_SAMPLED: Final = 5
_SCORED: Final = 4
_KEY_BLOCK: Final = 128  # slots that attention looks at together
_ASKED: Final = 14  # bytes for each token of the vocabulary: a request's bias, counts, bans, what was seen


def largest_step(settings: SchedulerConfig, max_model_len: int) -> Slices:
    """As many tokens as a step may have, in as many slices whose next token is drawn."""
    left, most = settings.max_num_batched_tokens, _sampled_rows(settings)
    slices: list[tuple[int, int]] = []
    while left and len(slices) < most:
        others = most - len(slices) - 1
        size = max(1, min(left - others, max_model_len))
        slices.append((0, size))
        left -= size
    return tuple(slices)


def counted_bytes(config: TransformerConfig, item_bytes: int, settings: SchedulerConfig) -> int:
    """From the shapes, rather too much. A layer's values are given back before the next one's are made, and
    those of all layers before logits are."""
    rows, sampled = settings.max_num_batched_tokens, _sampled_rows(settings)
    hidden = rows * config.hidden_size * item_bytes
    attention = _attention_bytes(config, item_bytes, rows, min(rows, settings.max_num_seqs))
    layers = 6 * hidden + max(attention, _mlp_bytes(config, item_bytes, rows))
    logit_bytes = 4 + item_bytes
    piece = rows_of_piece(config.vocab_size)
    drawing = sampled * logit_bytes + _SAMPLED * 4 * min(sampled, piece)
    scoring = min(rows, piece) * (logit_bytes + _SCORED * 4)
    return max(layers, 2 * hidden + config.vocab_size * max(drawing, scoring))


def asked_bytes(config: TransformerConfig, settings: SchedulerConfig) -> int:
    """Of all that requests may ask of their logits, which is kept while they live."""
    return settings.max_num_seqs * config.vocab_size * _ASKED


def take_bytes(
    model: Transformer,
    dtype: torch.dtype,
    device: torch.device,
    settings: SchedulerConfig,
    max_model_len: int,
) -> int:
    """Computes the largest step on a device, over pages that are given back. What it took stays with torch
    for the steps to come: pages get what is free then. Raises EngineConfigError where it does not fit."""
    before = free_bytes(device)
    slices, size = largest_step(settings, max_model_len), settings.page_size
    num_pages = -(-slices[0][1] // size) * len(kv_groups(model.config))
    try:
        storage = KVStorage(model.config, num_pages, size, dtype, device)
        batches = BatchBuilder(model.config, model.ops, size, max_model_len, len(slices), device)
        StepStopwatch(model, storage, batches, num_pages).time(slices)
    except torch.OutOfMemoryError:
        raise EngineConfigError(
            f"the largest step does not fit beside the weights, {before} bytes are free: lower "
            f"max_num_batched_tokens = {settings.max_num_batched_tokens} or max_num_seqs = "
            f"{settings.max_num_seqs}"
        ) from None
    return before - free_bytes(device)


def _sampled_rows(settings: SchedulerConfig) -> int:
    """Of a step with drafts, at most."""
    return min(settings.max_num_batched_tokens, settings.max_num_seqs + MAX_GUESSED)


def _attention_bytes(config: TransformerConfig, item_bytes: int, rows: int, num_slices: int) -> int:
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    projected = rows * (heads + 2 * kv_heads) * size * item_bytes
    turned = 2 * rows * (heads + kv_heads) * size * 4
    merged = rows * heads * (2 * _KEY_BLOCK + 4 * size) * 4
    gathered = 2 * num_slices * kv_heads * _KEY_BLOCK * size * (item_bytes + 4)
    return projected + turned + merged + gathered


def _mlp_bytes(config: TransformerConfig, item_bytes: int, rows: int) -> int:
    dense = rows * config.intermediate_size * (3 * item_bytes + 4)
    if config.experts is None:
        return dense
    chosen = rows * config.experts.per_token * config.hidden_size * 2 * (item_bytes + 4)
    return max(dense, chosen + rows * config.experts.intermediate_size * (3 * item_bytes + 4))
