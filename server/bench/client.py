"""One client's view of one request."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from server.bench.events import EventSplitter, Usage, decode_event
from server.bench.http import Connection, HttpError, Target

if TYPE_CHECKING:
    from server.bench.workloads import Job

FAILURES = (OSError, HttpError, msgspec.DecodeError, ValueError, asyncio.TimeoutError)


@dataclass(slots=True)
class Outcome:
    """What one request got. Times in seconds; an `error` makes every figure but the times moot."""

    job: Job
    start_s: float  # of the monotonic clock
    end_s: float = 0.0
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def completion_s(self) -> float:
        return self.end_s - self.start_s


class Client:
    """Sends requests to one server, over connections that it keeps unless told otherwise."""

    def __init__(self, target: Target, *, model: str, api: str, keep_alive: bool, timeout_s: float) -> None:
        self.model = model
        self._target = target
        self._chat = api == "chat"
        self._path = "/v1/chat/completions" if self._chat else "/v1/completions"
        self._keep_alive = keep_alive
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A plain request. Raises HttpError unless it answers 200 with JSON, OSError when unreachable."""
        data = json.dumps(body).encode() if body is not None else b""
        connection = await self._acquire()
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await connection.send(method, path, data, keep_alive=self._keep_alive)
                answer = await connection.body()
        finally:
            self._release(connection)
        if status != 200:
            raise HttpError(_refusal(status, answer))
        try:
            return json.loads(answer)
        except ValueError:
            raise HttpError(f"{path} answered with something that is not JSON") from None

    async def measure(self, job: Job, prompt: str) -> Outcome:
        """Stream one completion. Never raises for what the server does: failures are in the outcome."""
        body = msgspec.json.encode(self._body(job, prompt))
        outcome = Outcome(job, time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._acquire()
                try:
                    await self._stream(connection, body, outcome)
                finally:
                    self._release(connection)
        except FAILURES as error:
            outcome.error = outcome.error or str(error) or type(error).__name__
        outcome.end_s = outcome.end_s or time.perf_counter()
        return outcome

    def _body(self, job: Job, prompt: str) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": prompt}]} if self._chat else {"prompt": prompt}
        return {
            **asked,
            "model": self.model,
            "max_tokens": job.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _stream(self, connection: Connection, body: bytes, outcome: Outcome) -> None:
        status = await connection.send("POST", self._path, body, keep_alive=self._keep_alive)
        if status != 200:
            raise HttpError(_refusal(status, await connection.body()))
        splitter = EventSplitter()
        reading = Reading(outcome)
        async for piece in connection.pieces():
            now_s = time.perf_counter()
            for data in splitter.feed(piece):
                reading.take(data, now_s)
        reading.finish()

    async def _acquire(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.stale:
                return connection
            connection.close()
        return await Connection.open(self._target)

    def _release(self, connection: Connection) -> None:
        if connection.reusable and self._keep_alive:
            self._idle.append(connection)
        else:
            connection.close()


class Reading:
    """Folds the events of a stream, with the times at which they came, into an outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._num_chunks = 0
        self._latest_s = 0.0
        self._usage: Usage | None = None
        self._finished = False

    def take(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self._finished = True
            return
        event = decode_event(data)
        if event.error is not None:
            raise HttpError(f"error in the stream: {json.dumps(event.error)[:300]}")
        self._usage = event.usage or self._usage
        for choice in event.choices:
            if choice.has_output:
                self._output(now_s)
            if choice.finish_reason is not None:
                self._finished = True
            self._outcome.end_s = now_s

    def _output(self, now_s: float) -> None:
        outcome = self._outcome
        if outcome.ttft_s is None:
            outcome.ttft_s = now_s - outcome.start_s
        else:
            outcome.gaps_s.append(now_s - self._latest_s)
        self._latest_s = now_s
        self._num_chunks += 1

    def finish(self) -> None:
        """The body has ended. Raises HttpError when the stream had not."""
        outcome = self._outcome
        if not self._finished:
            raise HttpError("the stream ended without a finish reason")
        if outcome.ttft_s is None:
            raise HttpError("the stream carried no output")
        outcome.output_tokens = self._num_chunks
        if self._usage is not None:
            outcome.prompt_tokens = self._usage.prompt_tokens
            outcome.output_tokens = self._usage.completion_tokens
            outcome.cached_tokens = self._usage.cached_tokens


def _refusal(status: int, body: bytes) -> str:
    return f"status {status}: {' '.join(body.decode(errors='replace').split())[:300]}"
