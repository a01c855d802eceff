"""Prometheus metrics: vLLM's names where the meaning is vLLM's, `octavo:` for what only we have.

Two sources. The engine's step outputs give tokens, their times and the scheduler's stats (which
`server.scheduler_metrics` shows); the server's streams say how each sequence ended. All calls come from
the event loop.

Counts hold exactly: of N sequences of T tokens each, time_to_first_token has N observations,
inter_token_latency N * (T - 1), generation_tokens N * T. Tokens that arrive k at a time share the
time since the previous ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from scheduler.plan import Tier
from scheduler.types import FinishReason
from server.refusals import REASONS
from server.scheduler_metrics import ENGINE, SchedulerMetrics, labels_of
from server.spec_decode_metrics import SpecDecodeMetrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.messages import Ready, SequenceOutput, StepOutput
    from scheduler.types import Request
    from server.buffers import Buffers

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
PER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKEN_BUCKETS = tuple(float(2**power) for power in range(15))
TOKEN_BUCKETS = tuple(float(scale * 10**power) for power in range(6) for scale in (1, 2, 5))
CHOICE_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass(slots=True)
class SequenceTimes:
    """When things happened to one sequence, on the monotonic clock; None until they did."""

    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    num_tokens: int = 0
    finished: bool = False


@dataclass(slots=True)
class RequestRecord:
    """What the metrics know of a request in flight."""

    request: Request
    sequences: list[SequenceTimes]
    prompt_counted: bool = False


@dataclass(slots=True)
class Totals:
    """Running totals for the log's throughput line."""

    prompt_tokens: int = 0
    generation_tokens: int = 0


class Metrics:
    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.totals = Totals()
        self._clock = clock
        self._model = model_name
        self._live: dict[str, RequestRecord] = {}
        self._ready: Ready | None = None
        self.scheduler = SchedulerMetrics(model_name)
        self.registry.register(self.scheduler)
        self._spec_decode = SpecDecodeMetrics(model_name, self.registry)
        self._make_counters()
        self._make_token_histograms()
        self._make_time_histograms()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def count_http(self, handler: str, method: str, status: int) -> None:
        """One HTTP request done. The caller bounds `handler` and `method`."""
        self._http.labels(handler, method, str(status)).inc()

    # Requests, as the server sees them

    def begin(self, request: Request) -> None:
        self._live[request.request_id] = RequestRecord(
            request, [SequenceTimes() for _ in range(request.num_choices)]
        )
        self._params_n.observe(request.num_choices)
        self._params_max_tokens.observe(request.sampling.max_tokens)

    def finish(self, request_id: str, index: int, reason: str) -> None:
        """One sequence ended; only the first end counts."""
        record = self._live.get(request_id)
        if record is None or record.sequences[index].finished:
            return
        times = record.sequences[index]
        times.finished = True
        self._observe_end(record.request, times, reason)

    def end(self, request_id: str) -> None:
        """The request is over; sequences still running count as aborted."""
        record = self._live.get(request_id)
        if record is None:
            return
        for index in range(len(record.sequences)):
            self.finish(request_id, index, "abort")
        self._max_generation_tokens.observe(max(times.num_tokens for times in record.sequences))
        del self._live[request_id]

    def count_refused(self, reason: str) -> None:
        """One HTTP request was not taken. `reason` is one of a fixed few."""
        self._refused.labels(self._model, reason).inc()

    def forget(self, request_id: str) -> None:
        """The engine did not take the request: its times, which are none, are not observed."""
        self._live.pop(request_id, None)

    # The engine

    def on_ready(self, ready: Ready) -> None:
        """A new engine computes. Its counters begin at zero."""
        if self._ready is not None:
            self._restarts.inc()
        self._ready = ready
        self.scheduler.begin_again(ready.num_pages)
        sizes = (ready.page_size, ready.num_pages, ready.host_pages)
        self._cache_config.clear()
        self._cache_config.labels(self._model, ENGINE, *map(str, sizes), ready.dtype).set(1)
        self._spec_decode.begin(ready.drafters)
        for tier, there in zip(Tier, (ready.host_pages, ready.host_pages, ready.disk_pages), strict=True):
            if there:  # shown from the start, at zero
                self._failed_copies.labels(self._model, tier.name.lower())

    def on_lost(self) -> None:
        """The engine is gone, and its pages with it."""
        self.scheduler.begin_again(0)
        self._step_time_ratio.set(0)

    def on_step(self, step: StepOutput) -> None:
        now = self._clock()
        for output in step.outputs:
            self._observe_output(output, now)
            self._spec_decode.count(output.verified)
        tokens = step.num_prompt_tokens + sum(len(output.tokens) for output in step.outputs)
        if tokens:
            self._iteration_tokens.observe(tokens)
        self.scheduler.stats = step.stats
        self._step_time_ratio.set(step.step_time_ratio)
        for tier in step.failed_copies:
            self._failed_copies.labels(self._model, tier.name.lower()).inc()

    def _observe_output(self, output: SequenceOutput, now: float) -> None:
        record = self._live.get(output.request_id)
        if record is None or record.sequences[output.index].finished:
            return
        times = record.sequences[output.index]
        times.first_scheduled_s = times.first_scheduled_s or output.first_scheduled_s
        if output.tokens:
            self._observe_tokens(record, times, len(output.tokens), now)

    def _observe_tokens(self, record: RequestRecord, times: SequenceTimes, count: int, now: float) -> None:
        if not record.prompt_counted:
            record.prompt_counted = True
            prompt = len(record.request.prompt_ids)
            self._prompt_tokens.inc(prompt)
            self._request_prompt_tokens.observe(prompt)
            self.totals.prompt_tokens += prompt
        self._observe_latency(record.request, times, count, now)
        times.num_tokens += count
        times.last_token_s = now
        self._generation_tokens.inc(count)
        self.totals.generation_tokens += count

    def _observe_latency(self, request: Request, times: SequenceTimes, count: int, now: float) -> None:
        gaps, gap = count, (now - times.last_token_s) / count
        if times.first_token_s is None:
            times.first_token_s = now
            self._first_token.observe(now - request.arrival_s)
            gaps, gap = count - 1, 0.0
        for _ in range(gaps):
            self._inter_token.observe(gap)

    def _observe_end(self, request: Request, times: SequenceTimes, reason: str) -> None:
        now = self._clock()
        self._success.labels(self._model, ENGINE, reason).inc()
        self._request_generation_tokens.observe(times.num_tokens)
        self._e2e.observe(now - request.arrival_s)
        started = times.first_scheduled_s
        self._queue.observe((started or now) - request.arrival_s)
        if started is None or times.first_token_s is None:
            return
        self._prefill.observe(times.first_token_s - started)
        decode_s = times.last_token_s - times.first_token_s
        self._decode.observe(decode_s)
        self._time_per_token.observe(decode_s / max(1, times.num_tokens - 1))
        self._inference.observe(times.last_token_s - started)

    def show_buffers(self, buffers: Buffers) -> None:
        """Read when somebody asks."""
        incoming, outgoing = buffers.incoming, buffers.outgoing
        self._buffered.labels(self._model, "in").set_function(lambda: incoming.num_bytes)
        self._buffered.labels(self._model, "out").set_function(lambda: outgoing.num_bytes)

    # Declarations

    def _counter(self, name: str, text: str) -> Counter:
        labels = labels_of(name, self._model)
        return Counter(name, text, [*labels], registry=self.registry).labels(**labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        labels = labels_of(name, self._model)
        return Histogram(name, text, [*labels], registry=self.registry, buckets=buckets).labels(**labels)

    def _make_counters(self) -> None:
        self._cache_config = Gauge(
            "vllm:cache_config_info",
            "Sizes of the KV cache, as labels.",
            ["model_name", "engine", "block_size", "num_gpu_blocks", "num_cpu_blocks", "dtype"],
            registry=self.registry,
        )
        self._step_time_ratio = Gauge(
            "octavo:step_time_ratio",
            "Measured over predicted time of the engine's steps, a mean of late. 0 before the first.",
            ["model_name"],
            registry=self.registry,
        ).labels(self._model)
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._restarts = self._counter("octavo:engine_restarts", "Engine processes that replaced a dead one.")
        self._failed_copies = Counter(
            "octavo:page_copies_failed",
            "Copies of KV pages that failed, damaged pages among them, by where they should have gone.",
            ["model_name", "to"],
            registry=self.registry,
        )
        self._success = Counter(
            "vllm:request_success",
            "Sequences that ended, by reason.",
            ["model_name", "engine", "finished_reason"],
            registry=self.registry,
        )
        for finish in FinishReason:  # shown from the start, at zero
            self._success.labels(self._model, ENGINE, finish.value)
        self._refused = Counter(
            "octavo:refused",
            "HTTP requests that were not taken, by reason.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        for reason in REASONS:
            self._refused.labels(self._model, reason)
        self._buffered = Gauge(
            "octavo:buffered_bytes",
            "Bytes of requests that are not accepted yet (in) and of output that is not sent (out).",
            ["model_name", "direction"],
            registry=self.registry,
        )
        self._http = Counter(
            "http_requests",
            "HTTP requests, by route template, method and status (499: the client left).",
            ["handler", "method", "status"],
            registry=self.registry,
        )

    def _make_token_histograms(self) -> None:
        self._iteration_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Prompt and output tokens per engine step.", STEP_TOKEN_BUCKETS
        )
        self._request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request.", TOKEN_BUCKETS
        )
        self._request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Output tokens per sequence.", TOKEN_BUCKETS
        )
        self._max_generation_tokens = self._histogram(
            "vllm:request_max_num_generation_tokens",
            "Output tokens of a request's longest sequence.",
            TOKEN_BUCKETS,
        )
        self._params_n = self._histogram("vllm:request_params_n", "Choices per request.", CHOICE_BUCKETS)
        self._params_max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "max_tokens per request.", TOKEN_BUCKETS
        )

    def _make_time_histograms(self) -> None:
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Between tokens of a sequence.", INTER_TOKEN_BUCKETS
        )
        self._time_per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Between tokens of a sequence, the mean of each; 0 for one token.",
            PER_TOKEN_BUCKETS,
        )
        self._e2e = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end.", REQUEST_BUCKETS
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step.", REQUEST_BUCKETS
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "From the first step to the last token.", REQUEST_BUCKETS
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From the first step to the first token.", REQUEST_BUCKETS
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", REQUEST_BUCKETS
        )
