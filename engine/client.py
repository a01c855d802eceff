"""How the server talks to an engine: the interface, and the engine in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq
import zmq.asyncio

from engine.journal import JournalEntry
from engine.messages import (
    Abort,
    Failed,
    FromEngine,
    Ready,
    SequenceOutput,
    StepOutput,
    Stop,
    Submit,
    ToEngine,
)
from scheduler.types import FinishReason, Request

if TYPE_CHECKING:
    from engine.config import EngineConfig

logger = logging.getLogger("octavo.engine")

Sink = Callable[[SequenceOutput], None]

RESTART_WINDOW_S = 600.0
STOP_TIMEOUT_S = 5.0


class EngineDead(Exception):
    """The engine cannot start, or died more often than it may be restarted. The text is one line."""


class EngineClient(Protocol):
    """All methods are called on the asyncio loop; sinks are called there too, and must not block."""

    ready: Ready | None  # None until start() returned, and again while the engine restarts
    on_step: Callable[[StepOutput], None] | None  # called for every step output before its sinks

    async def start(self) -> Ready:
        """Wait until the engine can compute. Raises EngineDead with the cause in one line."""
        ...

    async def died(self) -> str:
        """Wait until the engine is lost for good -> the cause in one line."""
        ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Send a request; `sink` hears of each of its choices until every one has had its terminal
        output. Survives a restart of the engine: the request is replayed with what was delivered."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End one choice or the whole request. An unknown one is ignored. No sink call follows for
        a whole request that was aborted; an aborted single choice still gets its terminal output."""
        ...

    async def close(self) -> None: ...


class EngineProcess:
    """An engine in its own process over a ZeroMQ socket on a private path; started again when it dies."""

    def __init__(
        self, config: EngineConfig, *, start_timeout_s: float = 600.0, max_restarts: int = 3
    ) -> None:
        self.ready: Ready | None = None
        self.on_step: Callable[[StepOutput], None] | None = None
        self.num_restarts = 0
        self._config = config
        self._start_timeout_s = start_timeout_s
        self._max_restarts = max_restarts
        self._deaths: deque[float] = deque()
        self._folder = Path(tempfile.mkdtemp(prefix="octavo-"))  # readable by this user alone
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._context: zmq.asyncio.Context | None = None
        self._entries: dict[str, tuple[JournalEntry, Sink]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._supervisor: asyncio.Task[None] | None = None
        self._first_ready: asyncio.Future[Ready] | None = None
        self._death: asyncio.Future[str] | None = None
        self._failure = ""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def spawn(self) -> None:
        """Start the process now, before there is a loop: its imports run beside the server's own."""
        config = msgspec.json.encode(self._config).decode()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.process", self._path(), config],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for the server, which drains
        )

    async def start(self) -> Ready:
        loop = asyncio.get_running_loop()
        self._first_ready = loop.create_future()
        self._death = loop.create_future()
        self._context = zmq.asyncio.Context()
        self._supervisor = asyncio.create_task(self._supervise())
        waiting: set[asyncio.Future[Ready] | asyncio.Future[str]] = {self._first_ready, self._death}
        await asyncio.wait(waiting, timeout=self._start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._first_ready.done():
            return self._first_ready.result()
        if self._death.done():
            raise EngineDead(self._death.result())
        await self.close()
        raise EngineDead(
            f"the engine was not ready within engine_start_timeout_s = {self._start_timeout_s:g}"
        )

    async def died(self) -> str:
        assert self._death is not None, "start() comes first"
        return await asyncio.shield(self._death)

    def submit(self, request: Request, sink: Sink) -> None:
        self._entries[request.request_id] = (JournalEntry(request), sink)
        self._send(Submit(request))

    def abort(self, request_id: str, index: int | None = None) -> None:
        found = self._entries.get(request_id)
        if found is None:
            return
        if index is None:
            del self._entries[request_id]
        else:
            found[0].aborted.add(index)
        self._send(Abort(request_id, index))

    async def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._send(Stop())
        process = self._process
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._close_socket()
        if self._context is not None:
            self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _supervise(self) -> None:
        """Run engine processes one after another until one fails to start or too many have died."""
        while True:
            self._failure = ""
            assert self._context is not None
            self._socket = self._context.socket(zmq.PAIR)
            self._socket.setsockopt(zmq.SNDHWM, 0)
            self._socket.setsockopt(zmq.RCVHWM, 0)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.bind(f"ipc://{self._path()}")
            if self._process is None:
                self.spawn()
            status = await self._serve_one()
            was_ready, self.ready = self.ready is not None, None
            self._close_socket()
            if (cause := self._fatal_cause(status, was_ready)) is not None:
                self._give_up(cause)
                return
            self.num_restarts += 1
            logger.error(
                "engine died status=%s restart=%d requests=%d", status, self.num_restarts, len(self._entries)
            )

    async def _serve_one(self) -> int:
        """Read from one engine process until it has ended -> its exit status."""
        assert self._process is not None
        assert self._socket is not None
        ended = asyncio.get_running_loop().create_future()
        _watch(self._process, ended)
        reading = asyncio.create_task(self._read(self._socket))
        try:
            status: int = await ended
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        # What it sent before it died still counts; the replay begins after it.
        while await self._socket.poll(0):
            self._take(await self._socket.recv())
        self._process = None
        return status

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._take(await socket.recv())

    def _take(self, frame: bytes) -> None:
        message = self._decoder.decode(frame)
        if isinstance(message, StepOutput):
            if self.on_step is not None:
                self.on_step(message)
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, Ready):
            self._resume(message)
        else:
            assert isinstance(message, Failed)
            self._failure = message.message

    def _resume(self, ready: Ready) -> None:
        self.ready = ready
        assert self._first_ready is not None
        if not self._first_ready.done():
            self._first_ready.set_result(ready)
        for entry, _ in self._entries.values():
            for message in entry.replay():
                self._send(message)

    def _deliver(self, output: SequenceOutput) -> None:
        found = self._entries.get(output.request_id)
        if found is None:
            return
        entry, sink = found
        news = entry.record(output)
        if not entry.live:
            del self._entries[output.request_id]
        if news is not None:
            sink(news)

    def _fatal_cause(self, status: int, was_ready: bool) -> str | None:
        """Why the engine is not started again, or None when it is."""
        cause = self._failure or f"the engine process ended with status {status}"
        if not was_ready:
            return cause
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths and self._deaths[0] < now - RESTART_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > self._max_restarts:
            return f"{cause}; it died {len(self._deaths)} times within {RESTART_WINDOW_S:g} s"
        return None

    def _give_up(self, cause: str) -> None:
        assert self._death is not None
        if not self._death.done():
            self._death.set_result(cause)
        entries, self._entries = list(self._entries.values()), {}
        for entry, sink in entries:
            for index in sorted(entry.live):
                sink(SequenceOutput(entry.request.request_id, index, finish=FinishReason.ERROR, error=cause))

    def _send(self, message: ToEngine) -> None:
        """Until the engine is ready nothing is sent: `_resume` replays whatever is in flight then."""
        if self.ready is None and not isinstance(message, Stop):
            return
        if self._socket is not None and not self._socket.closed:
            # Without a high-water mark the socket takes it at once; there is nothing to await.
            self._socket.send(self._encoder.encode(message))

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path())

    def _path(self) -> str:
        return str(self._folder / "engine.sock")


def _watch(process: subprocess.Popen[bytes], ended: asyncio.Future[int]) -> None:
    """Resolve `ended` on its loop when the process is gone; a thread waits, since no poll may."""
    loop = ended.get_loop()

    def resolve(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    def wait() -> None:
        status = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed first
            loop.call_soon_threadsafe(resolve, status)

    threading.Thread(target=wait, name="engine-watch", daemon=True).start()
