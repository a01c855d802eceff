"""From a configuration to an engine that can compute: device, dtype, weights, pages, scheduler."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cuda_kernels.ops import pick
from engine.batch import BatchBuilder
from engine.checkpoint import Checkpoint, locate
from engine.core import EngineCore
from engine.kv_storage import KVStorage
from engine.measured_costs import MEASURE, measured_costs
from engine.messages import Phase, Ready
from engine.models.context import for_context
from engine.models.kv_groups import kv_spans, kv_values, page_values
from engine.models.transformer import Transformer
from engine.runner import Runner
from engine.state import LengthsFile, state_folder
from engine.tiers.copier import Copier
from engine.tiers.disk import open_disk_file
from engine.tiers.host import HostPool
from engine.tiers.identity import kv_identity
from engine.tiers.measure import measure_copies
from engine.weights.loader import load_weights
from engine.weights.paths import named_path
from scheduler.machine import MachineError
from scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.tiers.disk import DiskFile
    from scheduler.config import SchedulerConfig
    from scheduler.costs import CostModel

logger = logging.getLogger("octavo.engine")

CPU_MEMORY_SHARE = 0.25  # of what is free after the weights are loaded; pages are touched as they are used
GPU_MEMORY_SHARE = 0.8


class EngineConfigError(Exception):
    """The configuration cannot be served on this machine; one line with the numbers and the way out."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    core: EngineCore
    ready: Ready
    lengths: LengthsFile


class _Stopwatch:
    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.phases.append(Phase(name, now - self._last))
        self._last = now


def build_engine(config: EngineConfig, phases: tuple[Phase, ...] = ()) -> BuiltEngine:
    """Load the model and lay out the pages. Raises CheckpointError or EngineConfigError, one line each."""
    watch = _Stopwatch()
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    # The process is the engine's own: one pool of threads, all cores.
    torch.set_num_threads(config.num_threads or available_cores())
    checkpoint = locate(config.model, config.revision)
    max_model_len = _max_model_len(config, checkpoint)
    shape = for_context(checkpoint.transformer, max_model_len)
    adapter = named_path(config.lora, "lora") if config.lora else None
    checkpoint = replace(checkpoint, transformer=shape, adapter=adapter)
    watch.lap("locate checkpoint")
    weights = load_weights(checkpoint, dtype, device, free_bytes(device))
    watch.lap("load weights")
    ops = pick(device)
    model = Transformer(shape, weights, ops)
    watch.lap("build model")
    settings = _with_pages(config, checkpoint, dtype, device, max_model_len)
    # An explicit number of pages may hold less than the model's context: then that is the context.
    spans = kv_spans(shape, settings.page_size)
    max_model_len = spans.longest(settings.num_pages, settings.max_num_batched_tokens, max_model_len)
    storage = KVStorage(shape, settings.num_pages, settings.page_size, dtype, device)
    settings, copier, disk_index = _lower_tiers(config, settings, storage, checkpoint)
    batches = BatchBuilder(shape, ops, settings.page_size, max_model_len, settings.max_num_seqs, device)
    watch.lap("lay out pages")
    costs = _costs(config, settings, checkpoint, model, storage, batches, copier)
    watch.lap("measure costs")
    lengths = LengthsFile(state_folder(config), kv_identity(checkpoint, dtype, device, settings.page_size))
    scheduler = Scheduler(
        settings, time.monotonic, max_model_len, costs, lengths.lengths, disk_index, spans.spans
    )
    core = EngineCore(scheduler, Runner(model, storage, batches, scheduler), shape.vocab_size, copier)
    ready = Ready(
        max_model_len=max_model_len,
        vocab_size=shape.vocab_size,
        page_size=settings.page_size,
        num_pages=settings.num_pages,
        # Of a sequence as long as can be: behind windows nothing is kept.
        kv_bytes_per_token=kv_values(shape, max_model_len, settings.page_size)
        * dtype.itemsize
        // max_model_len,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        phases=(*phases, *watch.phases),
        host_pages=settings.host_pages,
        disk_pages=settings.disk_pages,
        costs=costs,
    )
    return BuiltEngine(core, ready, lengths)


def _lower_tiers(
    config: EngineConfig, settings: SchedulerConfig, storage: KVStorage, checkpoint: Checkpoint
) -> tuple[SchedulerConfig, Copier | None, dict[bytes, int]]:
    """Host and disk pages as configured -> settings with their numbers, who copies, what the disk holds."""
    host_pages = settings.host_pages or config.host_cache_bytes // storage.page_bytes
    disk_pages = settings.disk_pages or config.disk_cache_bytes // storage.page_bytes
    if not host_pages:
        if disk_pages:
            raise EngineConfigError(
                f"a disk cache needs host pages above it: host_cache_bytes must be at least "
                f"{storage.page_bytes}"
            )
        return replace(settings, host_pages=0, disk_pages=0), None, {}
    free = free_bytes(torch.device("cpu"))
    if storage.pages.device.type == "cpu":
        free -= settings.num_pages * storage.page_bytes  # promised, though not touched yet
    if host_pages * storage.page_bytes > free:
        raise EngineConfigError(
            f"{host_pages} host pages take {host_pages * storage.page_bytes} bytes, {max(0, free)} are free: "
            f"lower host_cache_bytes"
        )
    disk = None
    if disk_pages:
        identity = kv_identity(checkpoint, storage.pages.dtype, storage.pages.device, settings.page_size)
        disk = open_disk_file(_disk_path(config, identity), identity, storage.page_bytes, disk_pages)
    # Without a prefix cache pages are private, by numbers that every process counts anew.
    index = _disk_index(disk) if disk and settings.prefix_cache else {}
    copier = Copier(storage, HostPool(storage, host_pages), disk)
    return replace(settings, host_pages=host_pages, disk_pages=disk_pages if disk else 0), copier, index


def _disk_index(disk: DiskFile) -> dict[bytes, int]:
    """What the file holds by its table; nothing, and a line in the log, where that cannot be read."""
    try:
        return disk.index()
    except OSError as error:
        logger.warning("%s counts as empty, its table cannot be read: %s", disk.path, error.strerror)
        return {}


def _disk_path(config: EngineConfig, identity: bytes) -> Path:
    if config.disk_cache_path:
        return Path(config.disk_cache_path).expanduser()
    folder = state_folder(config)
    if folder is None:
        raise EngineConfigError("disk_cache_bytes is set and state_folder is -: set disk_cache_path")
    return folder / f"kv-{hashlib.sha256(identity).hexdigest()[:16]}.pages"


def _costs(
    config: EngineConfig,
    settings: SchedulerConfig,
    checkpoint: Checkpoint,
    model: Transformer,
    storage: KVStorage,
    batches: BatchBuilder,
    copier: Copier | None,
) -> CostModel:
    try:
        folder = state_folder(config)
        costs = measured_costs(config.costs, checkpoint, model, storage, batches, settings, folder)
    except MachineError as error:
        raise EngineConfigError(str(error)) from None
    if copier is None or config.costs not in ("", MEASURE):
        return costs
    copying = measure_copies(storage, copier.host, copier.disk)
    return replace(
        costs,
        host_page_s=copying.host_page_s or costs.host_page_s,
        disk_page_s=copying.disk_page_s or costs.disk_page_s,
    )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineConfigError("device = cuda, but torch sees no CUDA device; use device = cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
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


def _max_model_len(config: EngineConfig, checkpoint: Checkpoint) -> int:
    longest = checkpoint.transformer.max_positions
    if config.max_model_len > longest:
        raise EngineConfigError(
            f"max_model_len = {config.max_model_len}, but the model has {longest} positions; use at most that"
        )
    return config.max_model_len or longest


def _with_pages(
    config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, max_model_len: int
) -> SchedulerConfig:
    settings, shape = config.scheduler, checkpoint.transformer
    page_bytes = page_values(shape, settings.page_size) * dtype.itemsize
    num_pages, chunk = settings.num_pages, settings.max_num_batched_tokens
    spans = kv_spans(shape, settings.page_size)
    needed = spans.most_pages(max_model_len, chunk)
    free = free_bytes(device)
    if not num_pages:
        share = CPU_MEMORY_SHARE if device.type == "cpu" else GPU_MEMORY_SHARE
        fitting = (config.kv_cache_bytes or int(free * share)) // page_bytes
        num_pages = min(settings.max_num_seqs * needed, fitting)
    fit = spans.longest(num_pages, chunk, max_model_len)
    if fit < max_model_len and not settings.num_pages:
        raise EngineConfigError(
            f"KV pages for {fit} tokens fit, one sequence of max_model_len = "
            f"{max_model_len} needs {needed * page_bytes} bytes of {free} free: lower max_model_len or "
            f"raise kv_cache_bytes"
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
            f"{num_pages} KV pages take {num_pages * page_bytes} bytes, {free} are free: lower num_pages or "
            f"kv_cache_bytes"
        )
    # The server refuses what is too much, in sequences; here is a backstop that it never reaches.
    backstop = settings.max_queued_requests + settings.max_num_seqs
    return replace(settings, num_pages=num_pages, max_queued_requests=backstop)


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
