"""From a configuration to an engine that can compute: device, dtype, weights, pages, scheduler."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from cuda_kernels.ops import pick
from engine import sizing
from engine.batch import BatchBuilder
from engine.checkpoint import locate
from engine.core import EngineCore
from engine.drafting import AUTO, LIGHT
from engine.drafting.guess import DraftsAhead
from engine.drafting.loading import find_drafters, load_drafters
from engine.drafting.overlap import Overlap, overlap_threads
from engine.drafting.skips.scratch_pages import num_scratch_pages
from engine.drafting.skips.skipped_layers import SkippedLayers
from engine.drafting.surroundings import Surroundings
from engine.kv_storage import KVStorage
from engine.measured_costs import MEASURE, measured_costs
from engine.messages import Phase, Ready
from engine.models.context import for_context
from engine.models.kv_groups import kv_spans, kv_values
from engine.models.transformer import Transformer
from engine.runner import Runner
from engine.sizing import EngineConfigError
from engine.state import LengthsFile, state_folder
from engine.step_memory import asked_bytes, counted_bytes, take_bytes
from engine.tiers.copier import Copier
from engine.tiers.disk import open_disk_file
from engine.tiers.host import HostPool
from engine.tiers.identity import kv_identity
from engine.tiers.measure import measure_copies
from engine.weights.checksum import weights_digest
from engine.weights.loader import load_weights
from engine.weights.paths import named_path
from scheduler.machine import MachineError
from scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.config import EngineConfig
    from engine.drafting.guess import Drafter
    from engine.drafting.loading import Found
    from engine.tiers.disk import DiskFile
    from scheduler.config import SchedulerConfig
    from scheduler.costs import CostModel

logger = logging.getLogger("octavo.engine")

SKIPPED_LAYERS = "skipped_layers"


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


class Weights(NamedTuple):
    tensors: dict[str, torch.Tensor]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all engines of a configuration have in common: made once, before they are forked."""

    checkpoint: Checkpoint  # with the shape for its context
    max_model_len: int
    found: tuple[Found, ...]  # drafters
    weights: Weights | None  # on a CPU; None where each engine loads its own
    phases: tuple[Phase, ...]


def prepare(config: EngineConfig, phases: tuple[Phase, ...] = ()) -> Prepared:
    """All that leaves no thread behind and touches no CUDA. Raises CheckpointError or EngineConfigError."""
    watch = _Stopwatch()
    # A fork hangs that spreads an operation over threads of which the process it came from had some.
    torch.set_num_threads(1)
    checkpoint = locate(config.model, config.revision)
    max_model_len = sizing.served_len(config, checkpoint)
    shape = for_context(checkpoint.transformer, max_model_len)
    adapter = named_path(config.lora, "lora") if config.lora else None
    checkpoint = replace(checkpoint, transformer=shape, adapter=adapter)
    found = find_drafters(config.draft_model, checkpoint, shape)
    _check_drafter(config, (*LIGHT, SKIPPED_LAYERS, *(one.kind.value for one in found)))
    watch.lap("locate checkpoint")
    weights = None
    if config.device == "cpu" or not _has_cuda_driver():
        device = sizing.choose_device(config.device)
        weights = _weights(config, checkpoint, device)
        watch.lap("load weights")
    return Prepared(checkpoint, max_model_len, found, weights, (*phases, *watch.phases))


def _has_cuda_driver() -> bool:
    """Found out without a call to CUDA: after one no fork can use it."""
    if torch.version.cuda is None:
        return torch.version.hip is not None
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _weights(config: EngineConfig, checkpoint: Checkpoint, device: torch.device) -> Weights:
    dtype, num_threads = sizing.choose_dtype(config.dtype, device), _num_threads(config)
    tensors = load_weights(checkpoint, dtype, device, sizing.free_bytes(device), num_threads)
    return Weights(tensors, weights_digest(tensors, num_threads))


def _num_threads(config: EngineConfig) -> int:
    return config.num_threads or sizing.available_cores()


def build_engine(config: EngineConfig, prepared: Prepared | None = None) -> BuiltEngine:
    """Load the model, as far as that is not prepared, and lay out the pages. Raises CheckpointError or
    EngineConfigError, one line each."""
    prepared = prepared or prepare(config)
    watch = _Stopwatch()
    device = sizing.choose_device(config.device)
    dtype = sizing.choose_dtype(config.dtype, device)
    torch.set_num_threads(_num_threads(config))  # the process is the engine's own: one pool of threads
    checkpoint, max_model_len, found = prepared.checkpoint, prepared.max_model_len, prepared.found
    shape = checkpoint.transformer
    weights = prepared.weights
    if weights is None:
        weights = _weights(config, checkpoint, device)
        watch.lap("load weights")
    ops, digest = pick(device), weights.digest
    model = Transformer(shape, weights.tensors, ops)
    watch.lap("build model")
    step_bytes = _step_bytes(config, model, dtype, device, max_model_len)
    promised_bytes = step_bytes + sum(one.size_bytes for one in found)
    config = sizing.with_draft_stores(config)
    settings = sizing.with_pages(config, checkpoint, dtype, device, max_model_len, promised_bytes)
    # An explicit number of pages may hold less than the model's context: then that is the context.
    spans = kv_spans(shape, settings.page_size)
    max_model_len = spans.longest(settings.num_pages, settings.max_num_batched_tokens, max_model_len)
    storage = KVStorage(
        shape, settings.num_pages, settings.page_size, dtype, device, num_scratch_pages(shape)
    )
    identity = kv_identity(digest, shape, ops, dtype, device, settings.page_size)
    settings, copier, disk_index = _lower_tiers(config, settings, storage, identity, step_bytes)
    batches = BatchBuilder(shape, ops, settings.page_size, max_model_len, settings.max_num_seqs, device)
    watch.lap("lay out pages")
    costs = _costs(config, settings, identity, model, storage, batches, copier)
    watch.lap("measure costs")
    lengths = LengthsFile(state_folder(config), digest)
    scheduler = Scheduler(
        settings, time.monotonic, max_model_len, costs, lengths.lengths, disk_index, spans.spans
    )
    runner = Runner(model, storage, batches, scheduler)
    drafters = _drafters(found, config, settings, Surroundings.of(runner, checkpoint), step_bytes)
    watch.lap("load drafters")
    overlap = _overlap(config, drafters, device)
    core = EngineCore(
        scheduler, runner, shape.vocab_size, copier, drafters, overlap, config.draft_store_bytes
    )
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
        phases=(*prepared.phases, *watch.phases),
        host_pages=settings.host_pages,
        disk_pages=settings.disk_pages,
        costs=costs,
        drafters=tuple(core.speculation.drafters),
        identity=identity.hex(),
    )
    return BuiltEngine(core, ready, lengths)


def _step_bytes(
    config: EngineConfig, model: Transformer, dtype: torch.dtype, device: torch.device, max_model_len: int
) -> int:
    """-> what steps will take of what is free; the largest one on a GPU has taken its part already"""
    asked = asked_bytes(model.config, config.scheduler)
    if device.type == "cpu":
        return asked + counted_bytes(model.config, dtype.itemsize, config.scheduler)
    taken = take_bytes(model, dtype, device, config.scheduler, max_model_len)
    logger.info("the largest step takes %.2f GB beside weights and KV pages", taken / 1e9)
    return asked


def _drafters(
    found: tuple[Found, ...],
    config: EngineConfig,
    settings: SchedulerConfig,
    around: Surroundings,
    step_bytes: int,
) -> dict[str, Drafter]:
    """Those beside the light ones, by name."""
    free = sizing.free_bytes(around.device) - step_bytes
    if around.device.type == "cpu":  # promised, though not touched yet
        free -= (settings.num_pages + settings.host_pages) * around.storage.page_bytes
        free -= config.draft_store_bytes
    drafters: dict[str, Drafter] = {SKIPPED_LAYERS: SkippedLayers(around)}
    return drafters | load_drafters(found, around, free)


def _overlap(config: EngineConfig, drafters: dict[str, Drafter], device: torch.device) -> Overlap | None:
    """Where one of them can draft ahead, and shall."""
    if not any(isinstance(drafter, DraftsAhead) for drafter in drafters.values()):
        return None
    num_cores = sizing.available_cores()
    threads = overlap_threads(config.draft_overlap, device, num_cores, config.num_threads or num_cores)
    if threads:
        logger.info("the draft model goes on while drafts are verified, on %d threads", threads)
    return Overlap(threads, device) if threads else None


def _check_drafter(config: EngineConfig, names: tuple[str, ...]) -> None:
    """That of requests which name none will be there."""
    if config.drafter not in (AUTO, *names):
        raise EngineConfigError(
            f"the drafter {config.drafter} is not loaded: name its weights in draft_model, or set drafter to "
            f"one of {', '.join((AUTO, *names))}"
        )


def _lower_tiers(
    config: EngineConfig,
    settings: SchedulerConfig,
    storage: KVStorage,
    identity: bytes,
    step_bytes: int = 0,
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
    free = sizing.free_bytes(torch.device("cpu")) - config.draft_store_bytes - step_bytes
    if storage.pages.device.type == "cpu":
        free -= settings.num_pages * storage.page_bytes  # promised, though not touched yet
    if host_pages * storage.page_bytes > free:
        raise EngineConfigError(
            f"{host_pages} host pages take {host_pages * storage.page_bytes} bytes, {max(0, free)} are free: "
            f"lower host_cache_bytes"
        )
    disk = None
    if disk_pages:
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
    identity: bytes,
    model: Transformer,
    storage: KVStorage,
    batches: BatchBuilder,
    copier: Copier | None,
) -> CostModel:
    try:
        folder = state_folder(config)
        costs = measured_costs(config.costs, identity, model, storage, batches, settings, folder)
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
