"""What steps cost on this machine: a few real ones are timed at start-up, before any page is in use.

Every step is a whole one: arrays, forward pass, one sampled token per slice. Page tables are made up over
a few pages, which are cleared afterwards, so nothing is left behind.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Final

import torch

from engine.sampling.places import Place
from engine.sampling.sampler import sample
from scheduler.costs import CostModel
from scheduler.fitting import FITTED, Sample, fit, relative_error, scaled
from scheduler.plan import Slice, StepPlan
from scheduler.types import Request, SamplingParams, Sequence

if TYPE_CHECKING:
    from engine.batch import BatchBuilder
    from engine.kv_storage import KVStorage
    from engine.models.transformer import Transformer

logger = logging.getLogger("octavo.engine")

# No step starts that is expected to end later. The first token of a cold start waits for it.
CPU_BUDGET_S: Final = 0.7
DEVICE_BUDGET_S: Final = 2.0  # the first step of each shape loads its kernels
MAX_ROUNDS: Final = 3  # the fastest of so many counts: what disturbs a step makes it slower
CPU_PAGES: Final = 16  # touching memory first takes longer than a step, and it stays taken
DEVICE_PAGES: Final = 4096  # enough that contexts do not lie in its caches
# Kinds of steps. Few tell only how fast the machine is; to fit each constant takes more than there are, or
# the fit follows the noise (with 6 kinds on 2 cores: off by 0 %, and a slice for nothing).
MIN_KINDS: Final = 4
MIN_KINDS_TO_FIT: Final = len(FITTED) + 3
MAX_USUAL_ERROR: Final = 0.3  # relative, of the median step; above it the machine was busy elsewhere

# The shape of the costs, which the samples scale: a small model on two CPU cores.
PRIOR: Final = CostModel(step_s=0.04, slice_s=0.003, token_s=0.0008, context_s=4e-6, pair_s=1.3e-6)

Slices = tuple[tuple[int, int], ...]  # (start, number of tokens) of each


@dataclass(frozen=True, slots=True)
class Calibration:
    """`usual_error`: the median of |predicted - measured| / measured. Not `steady`: too few steps fitted
    in, or they fit together so badly that the figures should not outlive this process."""

    costs: CostModel
    num_steps: int
    seconds: float
    usual_error: float
    steady: bool


def calibrate(
    model: Transformer,
    storage: KVStorage,
    batches: BatchBuilder,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    budget_s: float | None = None,
) -> Calibration:
    """Time steps for about `budget_s` and fit a cost model; copies of pages are not measured here.

    One step is timed, however slow. A step that fails ends the measuring with a warning.
    """
    begun = time.perf_counter()
    on_cpu = batches.device.type == "cpu"
    if budget_s is None:
        budget_s = CPU_BUDGET_S if on_cpu else DEVICE_BUDGET_S
    stopwatch = StepStopwatch(model, storage, batches, CPU_PAGES if on_cpu else DEVICE_PAGES)
    probes = probe_steps(max_num_seqs, max_num_batched_tokens, batches.max_slots)
    fastest: dict[Slices, float] = {}
    try:
        for slices in [probes[0], *probes * MAX_ROUNDS]:  # the very first warms up threads and buffers
            expected_s = fastest.get(slices) or _expected_s(slices, fastest)
            if fastest and time.perf_counter() - begun + expected_s > budget_s:
                continue
            seconds = stopwatch.time(slices)
            fastest[slices] = min(seconds, fastest.get(slices, seconds))
    except RuntimeError:  # out of memory, above all
        logger.warning("a calibration step failed; costs are estimated from %d", len(fastest), exc_info=True)
    finally:
        stopwatch.clear()
    return _calibration(_samples(fastest), time.perf_counter() - begun)


def probe_steps(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> list[Slices]:
    """Steps that tell the constants apart, those that tell much in little time first, within the limits."""
    rows = min(max_num_seqs, max_num_batched_tokens)
    far = max(0, min(1024, max_model_len - 128))
    chunk = min(128, max_num_batched_tokens, max_model_len)
    near = min(128, max_model_len - 1)
    wished: list[Slices] = [
        ((0, 1),),
        ((0, min(32, chunk)),),
        ((near, 1),) * min(8, rows),
        ((far, 1),),
        ((0, chunk),),
        ((far, min(32, chunk)),),
        ((near, 1),) * rows,
        ((0, min(512, max_num_batched_tokens, max_model_len)),),
        ((far, 1),) * min(8, rows),
        ((far, chunk),),
    ]
    return [
        slices
        for slices in dict.fromkeys(wished)
        if all(start + num_tokens <= max_model_len for start, num_tokens in slices)
    ]


def _expected_s(slices: Slices, fastest: dict[Slices, float]) -> float:
    """By the prior, at the speed of the steps so far. To fit them each time would take as long as a step."""
    predicted = sum(PRIOR.step(known) for known in fastest)
    return PRIOR.step(slices) * (sum(fastest.values()) / predicted if predicted else 1.0)


def _samples(fastest: dict[Slices, float]) -> list[Sample]:
    return [Sample(slices, seconds) for slices, seconds in fastest.items()]


def _calibration(samples: list[Sample], seconds: float) -> Calibration:
    costs = fit(samples, PRIOR) if len(samples) >= MIN_KINDS_TO_FIT else scaled(samples, PRIOR)
    usual_error = relative_error(samples, costs) if samples else 0.0
    steady = len(samples) >= MIN_KINDS and usual_error <= MAX_USUAL_ERROR
    return Calibration(costs, len(samples), seconds, usual_error, steady)


class StepStopwatch:
    """Computes made-up slices over the first pages of a pool that nobody uses yet."""

    def __init__(self, model: Transformer, storage: KVStorage, batches: BatchBuilder, max_pages: int) -> None:
        self.model = model
        self.storage = storage
        self.batches = batches
        self.num_pages = min(max_pages, len(storage.keys[0]))
        self.clear()  # touches their memory, which would be slow once, inside the first steps

    @torch.inference_mode()
    def time(self, slices: Slices) -> float:
        """Seconds that a step with these slices takes."""
        pieces = self._pieces(slices)
        places = [Place(_sequence(piece)) for piece in pieces]
        self._wait()
        begun = time.perf_counter()
        try:
            rows = self.batches.build(StepPlan(0, pieces))
            sample(self.model.forward(rows, self.storage), places)
            self._wait()
        finally:
            for piece in pieces:
                self.batches.release(piece.seq_id)
        return time.perf_counter() - begun

    @torch.inference_mode()
    def clear(self) -> None:
        """Whatever was computed, the pool is as empty as it was."""
        self.storage.clear(list(range(self.num_pages)))

    def _pieces(self, slices: Slices) -> tuple[Slice, ...]:
        """Where pages are too few, sequences share them: what they hold means nothing."""
        pages = cycle(range(self.num_pages))
        pieces = []
        for index, (start, num_tokens) in enumerate(slices):
            count = -(-(start + num_tokens) // self.batches.page_size) * len(self.batches.groups)
            pieces.append(
                Slice(
                    seq_id=-1 - index,
                    start=start,
                    tokens=(0,) * num_tokens,
                    positions=range(start, start + num_tokens),
                    first_new_page=0,
                    new_pages=tuple(islice(pages, count)),
                    num_logits=1,
                )
            )
        return tuple(pieces)

    def _wait(self) -> None:
        if self.batches.device.type == "cuda":
            torch.cuda.synchronize(self.batches.device)


def _sequence(piece: Slice) -> Sequence:
    request = Request(request_id="calibration", prompt_ids=(0,), sampling=SamplingParams())
    return Sequence(piece.seq_id, request, 0, [0])
