"""How the server talks to an engine: the interface, and the engine in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq

from engine.child import EngineChild, engine_command
from engine.journal import JournalEntry
from engine.messages import (
    Abort,
    Begun,
    Failed,
    FromEngine,
    Inspect,
    Inspected,
    Log,
    Ready,
    SequenceOutput,
    StepOutput,
    Submit,
    ToEngine,
)
from scheduler.types import FinishReason, Request

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from scheduler.snapshot import Snapshot

logger = logging.getLogger("octavo.engine")

Sink = Callable[[SequenceOutput], None]

RESTART_WINDOW_S = 600.0
MAX_DEATHS_WITHOUT_PROGRESS = 2


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

    def abort(self, request_id: str, index: int | None = None, *, natural: bool = False) -> None:
        """End one choice or the whole request. An unknown one is ignored. No sink call follows for
        a whole request that was aborted; an aborted single choice still gets its terminal output.
        `natural`: a stop string was found, so lengths are learned from it as from any other end."""
        ...

    async def inspect(self, max_sequences: int) -> Snapshot:
        """The scheduler's state now. Raises EngineDead if the engine is lost before it answers."""
        ...

    async def close(self) -> None: ...


class EngineProcess:
    """An engine in its own process over a ZeroMQ socket on a private path; started again when it dies.

    It counts as dead when its process ends, when it is not ready within `start_timeout_s`, and when it has
    work and says nothing for `stall_timeout_s`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        start_timeout_s: float = 600.0,
        stall_timeout_s: float = 120.0,
        max_restarts: int = 3,
        log_level: str = "info",
        command: Sequence[str] = (),
    ) -> None:
        """`command`: starts the process, in place of the engine's own."""
        self.ready: Ready | None = None
        self.on_step: Callable[[StepOutput], None] | None = None
        self.num_restarts = 0
        self._command = command or engine_command()
        self._arguments = [msgspec.json.encode(config).decode(), log_level]
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._max_restarts = max_restarts
        self._deaths: deque[float] = deque()
        self._child: EngineChild | None = None
        self._entries: dict[str, tuple[JournalEntry, Sink]] = {}
        self._inspections: dict[int, asyncio.Future[Snapshot]] = {}
        self._num_inspections = 0
        self._supervisor: asyncio.Task[None] | None = None
        self._first_ready: asyncio.Future[Ready] | None = None
        self._death: asyncio.Future[str] | None = None
        self._failure = ""
        self._heard_s = 0.0  # when the engine last said something, or got its first work after a rest

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    def spawn(self) -> None:
        """Start the process now, before there is a loop: its imports run beside the server's own. Raises
        EngineDead where none can be started."""
        self._heard_s = time.monotonic()
        try:
            self._child = EngineChild(self._command, self._arguments)
        except (OSError, zmq.ZMQError) as error:
            raise EngineDead(f"the engine cannot be reached: {error}") from None

    def kill(self) -> None:
        """End the process at once, whatever it does, and leave nothing behind."""
        if self._child is not None:
            self._child.end()
            self._child = None

    async def start(self) -> Ready:
        loop = asyncio.get_running_loop()
        self._first_ready = loop.create_future()
        self._death = loop.create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        waiting: set[asyncio.Future[Ready] | asyncio.Future[str]] = {self._first_ready, self._death}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._first_ready.done():
            return self._first_ready.result()
        raise EngineDead(self._death.result())

    async def died(self) -> str:
        assert self._death is not None, "start() comes first"
        return await asyncio.shield(self._death)

    def submit(self, request: Request, sink: Sink) -> None:
        if not self._entries:
            self._heard_s = time.monotonic()
        self._entries[request.request_id] = (JournalEntry(request), sink)
        self._send(Submit(request))

    def abort(self, request_id: str, index: int | None = None, *, natural: bool = False) -> None:
        found = self._entries.get(request_id)
        if found is None:
            return
        message = Abort(request_id, index, natural)
        if index is None:
            del self._entries[request_id]
        else:
            found[0].aborted[index] = message
        self._send(message)

    async def inspect(self, max_sequences: int) -> Snapshot:
        if self.ready is None:
            raise EngineDead("the engine is not ready")
        self._num_inspections += 1
        number = self._num_inspections
        answer: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._inspections[number] = answer
        self._send(Inspect(number, max_sequences))
        try:
            return await answer
        finally:
            del self._inspections[number]

    async def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        child, self._child = self._child, None
        if child is not None:
            await child.stop()

    async def _supervise(self) -> None:
        """Run engine processes one after another; whatever ends this ends every stream with the cause."""
        cause = "the engine's supervisor was stopped"
        try:
            cause = await self._run_engines()
        except EngineDead as error:
            cause = str(error)
        except Exception as error:
            logger.exception("the engine's supervisor failed")
            cause = f"the engine's supervisor failed: {error}"
        finally:
            self._give_up(cause)

    async def _run_engines(self) -> str:
        """-> why no further engine is started"""
        while True:
            self._failure = ""
            if self._child is None:
                self.spawn()
            assert self._child is not None
            status = await self._serve_one(self._child)
            was_ready, self.ready = self.ready is not None, None
            self._fail_inspections()
            self.kill()
            if (cause := self._fatal_cause(status)) is not None:
                return cause
            if was_ready:  # else it was given no request
                self._give_up_stuck_requests()
            self.num_restarts += 1
            logger.error(
                "engine died status=%s restart=%d requests=%d", status, self.num_restarts, len(self._entries)
            )

    async def _serve_one(self, child: EngineChild) -> int:
        """Read from one engine process until it has ended -> its exit status."""
        ended = child.ended()
        reading = asyncio.create_task(self._read(child))
        patience_s = min(self._start_timeout_s, self._stall_timeout_s)
        try:
            while not ended.done():
                await asyncio.wait((ended, reading), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                if reading.done() or self._is_overdue():
                    child.kill()
                    await ended
            # What it sent before it died still counts; the replay begins after it.
            received = asyncio.create_task(child.all_received())
            try:
                await asyncio.wait((received, reading), return_when=asyncio.FIRST_COMPLETED)
            finally:
                received.cancel()
        finally:
            reading.cancel()
            (outcome,) = await asyncio.gather(reading, return_exceptions=True)
            if isinstance(outcome, Exception):
                logger.error("reading from the engine failed", exc_info=outcome)
                self._failure = self._failure or "the engine sent what is no message"
        return ended.result()

    def _is_overdue(self) -> bool:
        """Whether the engine should have said something by now."""
        silent_s = time.monotonic() - self._heard_s
        if self.ready is None and silent_s >= self._start_timeout_s:
            self._failure = f"the engine was not ready within engine_start_timeout_s = {silent_s:.0f}"
        elif self.ready is not None and self._entries and silent_s >= self._stall_timeout_s:
            self._failure = f"the engine made no step within engine_stall_timeout_s = {silent_s:.0f}"
        else:
            return False
        logger.error("%s; it is killed", self._failure)
        return True

    async def _read(self, child: EngineChild) -> None:
        while True:
            self._take(await child.receive())

    def _take(self, message: FromEngine) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, StepOutput):
            if self.on_step is not None:
                try:
                    self.on_step(message)
                except Exception:
                    logger.exception("counting a step failed")
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, Ready):
            self._resume(message)
        elif isinstance(message, Begun):
            for request_id in message.request_ids:
                if request_id in self._entries:
                    self._entries[request_id][0].begun = True
        elif isinstance(message, Inspected):
            answer = self._inspections.get(message.number)
            if answer is not None and not answer.done():
                answer.set_result(message.snapshot)
        elif isinstance(message, Log):
            logger.log(message.level, "%s", message.text)
        else:
            assert isinstance(message, Failed)
            self._failure = message.message

    def _resume(self, ready: Ready) -> None:
        self.ready = ready
        assert self._child is not None
        self._child.hide()
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
        if news is None:
            return
        try:
            sink(news)
        except Exception:
            logger.exception("delivering to request=%s failed", output.request_id)
            self.abort(output.request_id)

    def _fatal_cause(self, status: int) -> str | None:
        """Why the engine is not started again, or None when it is. One that never got ready never will."""
        cause = self._failure or _cause_of(status)
        assert self._first_ready is not None
        if not self._first_ready.done():
            return cause
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > self._max_restarts:
            return f"{cause}; it died {len(self._deaths)} times within {RESTART_WINDOW_S:g} s"
        return None

    def _fail_inspections(self) -> None:
        for answer in self._inspections.values():
            if not answer.done():
                answer.set_exception(EngineDead("the engine was lost before it answered"))

    def _give_up_stuck_requests(self) -> None:
        """A request that got nowhere before two deaths in a row may be what kills the engine. Those that only
        waited are not blamed, unless nobody did more: then it died before it could say of whom."""
        begun = [request_id for request_id, (entry, _) in self._entries.items() if entry.begun]
        for request_id in begun or list(self._entries):
            entry, sink = self._entries[request_id]
            entry.deaths_without_progress += 1
            if entry.deaths_without_progress >= MAX_DEATHS_WITHOUT_PROGRESS:
                del self._entries[request_id]
                _end(entry, sink, "the engine died whenever it was given this request")

    def _give_up(self, cause: str) -> None:
        assert self._death is not None
        if not self._death.done():
            self._death.set_result(cause)
        self.ready = None
        self._fail_inspections()
        entries, self._entries = list(self._entries.values()), {}
        for entry, sink in entries:
            _end(entry, sink, cause)

    def _send(self, message: ToEngine) -> None:
        """Until the engine is ready nothing is sent: `_resume` replays whatever is in flight then."""
        if self.ready is not None and self._child is not None:
            self._child.send(message)


def _end(entry: JournalEntry, sink: Sink, cause: str) -> None:
    for index in sorted(entry.live):
        output = SequenceOutput(entry.request.request_id, index, finish=FinishReason.ERROR, error=cause)
        try:
            sink(output)
        except Exception:
            logger.exception("delivering to request=%s failed", entry.request.request_id)


def _cause_of(status: int) -> str:
    cause = f"the engine process ended with status {status}"
    return cause + {
        -signal.SIGBUS: " (SIGBUS): a file that it read shrank, or its disk failed",
        -signal.SIGKILL: " (SIGKILL): probably the system's memory ran out",
    }.get(status, "")
