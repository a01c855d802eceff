"""What of this machine the engine takes: device, dtype, cores, and memory for pages."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.drafting import STORE_BYTES
from engine.models.kv_groups import kv_spans, page_values

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.config import EngineConfig
    from scheduler.config import SchedulerConfig

CPU_MEMORY_SHARE = 0.25  # of what is free after the weights are loaded; pages are touched as they are used
GPU_MEMORY_SHARE = 0.9  # .. after the largest step has taken what it needs; not all comes back in one piece
DRAFT_STORE_SHARE = 1 / 16  # of the host's free memory


class EngineConfigError(Exception):
    """The configuration cannot be served on this machine; one line with the numbers and the way out."""


def choose_device(name: str) -> torch.device:
    """`name`: of `DEVICES`. Raises EngineConfigError for a device that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineConfigError("device = cuda, but torch sees no CUDA device; use device = cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`name`: of `DTYPES`."""
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Without the instructions bfloat16 products are emulated, many times slower than float32.
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def served_len(config: EngineConfig, checkpoint: Checkpoint) -> int:
    """The most tokens of a sequence, prompt and output, as asked for or as the model has them."""
    longest = checkpoint.transformer.max_positions
    if config.max_model_len > longest:
        raise EngineConfigError(
            f"max_model_len = {config.max_model_len}, but the model has {longest} positions; use at most that"
        )
    return config.max_model_len or longest


def with_draft_stores(config: EngineConfig) -> EngineConfig:
    """With the bytes that light drafters may take of the host's memory, once the weights are loaded."""
    fitting = int(free_bytes(torch.device("cpu")) * DRAFT_STORE_SHARE)
    return replace(config, draft_store_bytes=config.draft_store_bytes or min(STORE_BYTES, fitting))


def with_pages(
    config: EngineConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    promised_bytes: int,
) -> SchedulerConfig:
    """The scheduler's settings with its number of pages, once the weights are loaded. `promised_bytes` of
    what is free now are for others. Raises EngineConfigError, with the numbers and the way out, where the
    pages do not hold one whole sequence."""
    settings, shape = config.scheduler, checkpoint.transformer
    page_bytes = page_values(shape, settings.page_size) * dtype.itemsize
    num_pages, chunk = settings.num_pages, settings.max_num_batched_tokens
    spans = kv_spans(shape, settings.page_size)
    needed = spans.most_pages(max_model_len, chunk)
    step_settings = f"max_num_batched_tokens = {chunk} or max_num_seqs = {settings.max_num_seqs}"
    found = free_bytes(device)
    # On a CPU drafters' stores are promised of the same memory, though not touched yet.
    stores = config.draft_store_bytes if device.type == "cpu" else 0
    free = max(0, found - promised_bytes - stores)
    if not num_pages:
        fitting = (config.kv_cache_bytes or min(int(found * memory_share(device)), free)) // page_bytes
        num_pages = min(settings.max_num_seqs * needed, fitting)
    fit = spans.longest(num_pages, chunk, max_model_len)
    if fit < max_model_len and not settings.num_pages:
        raise EngineConfigError(
            f"KV pages for {fit} tokens fit, one sequence of max_model_len = "
            f"{max_model_len} needs {needed * page_bytes} bytes of {free} free beside the largest step: "
            f"lower max_model_len or {step_settings}, or raise kv_cache_bytes"
        )
    if config.max_model_len > fit:
        raise EngineConfigError(
            f"num_pages = {num_pages} holds {fit} tokens, less than "
            f"max_model_len = {config.max_model_len}: raise one or lower the other"
        )
    if not fit:
        raise EngineConfigError(
            f"num_pages = {num_pages} holds no sequence: the layers form {spans.num_groups} groups; raise it"
        )
    if num_pages * page_bytes > free:
        raise EngineConfigError(
            f"{num_pages} KV pages take {num_pages * page_bytes} bytes, {free} are free beside the largest "
            f"step: lower num_pages, kv_cache_bytes, draft_store_bytes or {step_settings}"
        )
    # The server refuses what is too much, in sequences; here is a backstop that it never reaches.
    backstop = settings.max_queued_requests + settings.max_num_seqs
    return replace(settings, num_pages=num_pages, max_queued_requests=backstop)


def memory_share(device: torch.device) -> float:
    """The part of free memory that pages may take by default."""
    return CPU_MEMORY_SHARE if device.type == "cpu" else GPU_MEMORY_SHARE


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; on a CPU within the limits of the container as well."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        # Pages of files that were read count as used, but are given up when memory is needed.
        files = dict(line.split() for line in used.with_name("memory.stat").read_text().splitlines())
        free = min(free, int(text) - int(used.read_text()) + int(files.get("inactive_file", 0)))
    return max(free, 0)


def available_cores() -> int:
    """Cores this process may use, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and (parts := quota.read_text().split())[0] != "max":
        cores = min(cores, -(-int(parts[0]) // int(parts[1])))
    return max(cores, 1)
