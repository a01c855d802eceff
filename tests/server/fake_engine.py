"""An engine without a model, in the server's process: deterministic tokens, one per step, and no pages.

It keeps the contract of EngineClient to the letter, so that the server can be tested against it:
one terminal output per sequence, none after a whole request was aborted, `on_step` before the sinks.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from engine.messages import Phase, Ready, SequenceOutput, StepOutput, TokenLogprobs
from scheduler.costs import CostModel
from scheduler.plan import LevelStats, SchedulerStats
from scheduler.snapshot import SequenceView, Snapshot, TenantView
from scheduler.types import FinishReason, SequenceState

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.client import Sink
    from scheduler.refusal import RefusalReason
    from scheduler.types import Request

ALPHABET = b"abcdefghijklmnopqrstuvwxyz"
NUM_PAGES = 100


def alphabet_reply(request: Request, index: int) -> list[int]:
    """a b c … for choice 0, b c d … for choice 1, and so on."""
    return [ALPHABET[(index + place) % 26] for place in range(request.sampling.max_tokens)]


@dataclass
class Live:
    request: Request
    index: int
    reply: list[int]
    sent: int = 0
    stop: bool = False  # abort of this choice asked for


@dataclass
class FakeEngine:
    reply: Callable[[Request, int], list[int]] = alphabet_reply
    step_s: float = 0.0
    vocab_size: int = 258
    drafters: tuple[str, ...] = ("prompt_lookup", "past_outputs", "recycling", "lookahead")
    max_model_len: int = 256
    tokens_per_step: int = 1
    stuck: bool = False  # accepts work and never answers
    error: str | None = None  # ends every sequence at once: the request is at fault
    refusal: RefusalReason | None = None  # with an error: the scheduler's
    retry_after_s: float = 0.0
    ready: Ready | None = None
    on_change: Callable[[], None] | None = None
    step_limit_s: float = 0.0
    on_step: Callable[[StepOutput], None] | None = None
    requests: list[Request] = field(default_factory=list)
    aborts: dict[str, float] = field(default_factory=dict)  # request id -> when
    natural: dict[tuple[str, int], bool] = field(default_factory=dict)  # of the aborts of choices
    live: dict[tuple[str, int], Live] = field(default_factory=dict)
    sinks: dict[str, Sink] = field(default_factory=dict)
    dead: asyncio.Future[str] | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.Task[None] | None = None

    async def start(self) -> Ready:
        self.ready = Ready(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            page_size=16,
            num_pages=NUM_PAGES,
            kv_bytes_per_token=1,
            host_pages=0,
            disk_pages=0,
            costs=CostModel(),
            dtype="float32",
            device="cpu",
            phases=(Phase("load", 0.0),),
            drafters=self.drafters,
        )
        self.dead = asyncio.get_running_loop().create_future()
        self._loop = asyncio.create_task(self._run())
        return self.ready

    def submit(self, request: Request, sink: Sink) -> None:
        self.requests.append(request)
        self.sinks[request.request_id] = sink
        for index in range(request.num_choices):
            live = Live(request, index, self.reply(request, index))
            self.live[request.request_id, index] = live
        self._wake.set()

    def abort(self, request_id: str, index: int | None = None, *, natural: bool = False) -> None:
        if index is not None:
            if (request_id, index) in self.live:
                self.live[request_id, index].stop = True
                self.natural[request_id, index] = natural
            return
        keys = [key for key in self.live if key[0] == request_id]
        for key in keys:
            del self.live[key]
        if self.sinks.pop(request_id, None) is not None and keys:
            self.aborts[request_id] = time.monotonic()

    async def inspect(self, max_sequences: int) -> Snapshot:
        if self.stuck:
            await asyncio.Event().wait()
        views = tuple(_view(live) for live in list(self.live.values())[:max_sequences])
        names = sorted({view.tenant for view in views})
        tenants = tuple(
            TenantView(name, 1.0, 0.0, sum(view.tenant == name for view in views), 0) for name in names
        )
        return Snapshot("mlfq", self._stats(), views, tenants, 0, 7)

    async def died(self) -> str:
        assert self.dead is not None
        return await self.dead

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            if not self.live or self.stuck:
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(self.step_s)
            if not self.stuck:
                self._step()

    def _step(self) -> None:
        begun = (live for live in self.live.values() if live.index == 0 and live.sent == 0)
        num_prompt_tokens = sum(len(live.request.prompt_ids) for live in begun)
        outputs = tuple(self._advance(live) for live in list(self.live.values()))
        if self.on_step is not None:
            self.on_step(StepOutput(outputs, self._stats(), num_prompt_tokens))
        for output in outputs:
            sink = self.sinks.get(output.request_id)
            if sink is not None:
                sink(output)

    def _stats(self) -> SchedulerStats:
        running = len(self.live)
        levels = (LevelStats(0, num_running=running), LevelStats(1))
        return SchedulerStats(num_running=running, num_pages=NUM_PAGES, num_pages_held=running, levels=levels)

    def _advance(self, live: Live) -> SequenceOutput:
        request, sampling = live.request, live.request.sampling
        if self.error is not None:
            return msgspec.structs.replace(
                self._end(live, FinishReason.ERROR),
                error=self.error,
                refused=True,
                refusal=self.refusal,
                retry_after_s=self.retry_after_s,
            )
        if live.stop:
            return self._end(live, FinishReason.ABORT)
        if request.deadline_s is not None and time.monotonic() > request.deadline_s:
            return self._end(live, FinishReason.DEADLINE)
        tokens = tuple(live.reply[live.sent : live.sent + self.tokens_per_step])
        first, live.sent = live.sent == 0, live.sent + len(tokens)
        stopped = next(
            (place for place, token in enumerate(tokens) if token in sampling.stop_token_ids), None
        )
        finish = None
        if stopped is not None:
            tokens, finish = tokens[: stopped + 1], FinishReason.STOP
        elif live.sent >= len(live.reply):
            finish = FinishReason.LENGTH
        if finish is not None:
            del self.live[request.request_id, live.index]
        return SequenceOutput(
            request.request_id,
            live.index,
            tokens,
            finish,
            tokens[-1] if stopped is not None else None,
            logprobs=None if sampling.logprobs is None else self._logprobs(tokens, live, sampling.logprobs),
            prompt_logprobs=self._prompt_logprobs(request) if first and live.index == 0 else None,
            num_cached=3 if first else 0,
            first_scheduled_s=time.monotonic() if first else None,
        )

    def _end(self, live: Live, finish: FinishReason) -> SequenceOutput:
        del self.live[live.request.request_id, live.index]
        return SequenceOutput(live.request.request_id, live.index, (), finish)

    def _logprobs(self, tokens: tuple[int, ...], live: Live, count: int) -> tuple[TokenLogprobs, ...]:
        return tuple(scored(token, -0.1 * (live.index + 1), count) for token in tokens)

    def _prompt_logprobs(self, request: Request) -> tuple[TokenLogprobs, ...] | None:
        count = request.sampling.prompt_logprobs
        return (
            None if count is None else tuple(scored(token, -0.5, count) for token in request.prompt_ids[1:])
        )


def _view(live: Live) -> SequenceView:
    return SequenceView(
        request_id=live.request.request_id,
        index=live.index,
        tenant=live.request.tenant,
        state=SequenceState.RUNNING,
        level=0,
        head_start_s=None,
        is_overdue=False,
        age_s=time.monotonic() - live.request.arrival_s,
        waiting_s=0.0,
        num_tokens=len(live.request.prompt_ids) + live.sent,
        num_computed=len(live.request.prompt_ids) + live.sent,
        num_output=live.sent,
        num_pages=1,
        num_preemptions=0,
        attained_s=0.0,
    )


def scored(token: int, logprob: float, count: int) -> TokenLogprobs:
    """The token at rank 2 behind the one after it, as greedy sampling never would: it tests more."""
    others = [((token + 1 + place) % 256, -0.05 - place) for place in range(count)]
    return TokenLogprobs(token, logprob, 2, tuple(others))
