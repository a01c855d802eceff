"""How the server talks to an engine: the interface, and the engine in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq

from engine.child import ENDING_S, EngineChild, ZygoteChild, engine_command
from engine.deaths import FIRST_PAUSE_S, MAX_PAUSE_S, Death, InARow, cause_of, oom_kills, shown, was_sent
from engine.journal import Journal, JournalEntry, Sink
from engine.messages import (
    Abort,
    Failed,
    FromEngine,
    FromZygote,
    Inspect,
    Inspected,
    Loading,
    Log,
    LongStep,
    Ready,
    SequenceOutput,
    StepOutput,
    ToEngine,
)
from scheduler.types import FinishReason, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from engine.config import EngineConfig
    from scheduler.snapshot import Snapshot

logger = logging.getLogger("octavo.engine")

# A step may take so many times what it is predicted to, if that is longer than the stall timeout.
STALL_FACTOR = 10.0
PATIENT_FACTOR = 4.0  # and for the one request that is to be given up otherwise, so many times that
RESTED_S = 60.0  # an engine that had nothing to do for so long was none that dies at once

STALLED = "the engine made no step within"  # what such a failure begins with


class EngineDead(Exception):
    """The engine cannot start, or died more often than it may be restarted. The text is one line."""


class EngineClient(Protocol):
    """All methods are called on the asyncio loop; sinks are called there too, and must not block."""

    ready: Ready | None  # None until start() returned, and again while the engine restarts
    on_step: Callable[[StepOutput], None] | None  # called for every step output before its sinks
    on_change: Callable[[], None] | None  # called after every change of `ready`
    step_limit_s: float  # what the step in flight may take, where it was announced as a long one; else 0

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

    It counts as dead when its process ends, when nothing is heard of its start for `start_timeout_s`, and
    when it has work and says nothing for `stall_timeout_s`, or for several times what its step is predicted
    to take.
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
        """`command`: starts the zygote, in place of the engine's own."""
        self.ready: Ready | None = None
        self.on_step: Callable[[StepOutput], None] | None = None
        self.on_change: Callable[[], None] | None = None
        self.step_limit_s = 0.0
        self.num_restarts = 0
        self._command = command or engine_command()
        self._arguments = [msgspec.json.encode(config).decode(), log_level]
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._in_a_row = InARow(max_restarts)
        self._zygote: ZygoteChild | None = None
        self._zygote_pause_s = FIRST_PAUSE_S
        self._zygote_status: int | None = None  # of the one before
        self._next_zygote: asyncio.TimerHandle | None = None
        self._child: EngineChild | None = None
        self._journal = Journal()
        self._inspections: dict[int, asyncio.Future[Snapshot]] = {}
        self._num_inspections = 0
        self._supervisor: asyncio.Task[None] | None = None
        self._first_ready: asyncio.Future[Ready] | None = None
        self._death: asyncio.Future[str] | None = None
        self._failure = ""
        self._num_oom_kills = 0  # of the system, when the engine started
        self._died_s = 0.0  # when the last engine did
        self._heard_s = 0.0  # when the engine last said something, or got its first work after a rest

    @property
    def pid(self) -> int | None:
        """Of the engine; None until it is there."""
        return self._child.pid if self._child is not None else None

    @property
    def zygote_pid(self) -> int | None:
        return self._zygote.pid if self._zygote is not None else None

    def spawn(self) -> None:
        """Start a process now, before there is a loop: its imports run beside the server's own. Raises
        EngineDead where none can be started."""
        self._heard_s = time.monotonic()
        self._num_oom_kills = oom_kills()
        try:
            if self._zygote is None:
                self._zygote = ZygoteChild(self._command, self._arguments)
            self._child = EngineChild(self._zygote)
        except (OSError, zmq.ZMQError) as error:
            raise EngineDead(f"the engine cannot be reached: {error}") from None

    def kill(self) -> None:
        """End the processes at once, whatever they do, and leave nothing behind."""
        if self._next_zygote is not None:
            self._next_zygote.cancel()
        self._end_zygote()
        self._end_child()

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
        if not self._journal:
            self._heard_s = time.monotonic()
        self._send_all(self._journal.add(request, sink))

    def abort(self, request_id: str, index: int | None = None, *, natural: bool = False) -> None:
        self._send_all(self._journal.abort(Abort(request_id, index, natural)))

    async def inspect(self, max_sequences: int) -> Snapshot:
        if self.ready is None or self._child is None:
            raise EngineDead("the engine is not ready")
        self._num_inspections += 1
        number = self._num_inspections
        answer: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._inspections[number] = answer
        self._child.send(Inspect(number, max_sequences))
        try:
            return await answer
        finally:
            del self._inspections[number]

    async def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        try:
            if self._child is not None and self.ready is not None:  # else it has nothing to bring to an end
                await self._child.stop()
        finally:  # who awaits this may be cancelled
            self.kill()

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _end_zygote(self, patience_s: float = 0.0) -> None:
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            self._zygote_status = zygote.end(patience_s)

    def _zygote_ended(self) -> None:
        """An engine that runs goes on; for the next one, another zygote begins."""
        self._end_zygote(ENDING_S)
        logger.warning("the engine's zygote ended %s", shown(self._zygote_status))
        loop = asyncio.get_running_loop()
        self._next_zygote = loop.call_later(self._zygote_pause_s, self._replace_zygote)
        self._zygote_pause_s = min(MAX_PAUSE_S, 2 * self._zygote_pause_s)

    def _replace_zygote(self) -> None:
        if self._zygote is None and self.ready is not None:  # else whoever starts the next engine sees to it
            try:
                self._zygote = ZygoteChild(self._command, self._arguments)
            except OSError as error:
                logger.warning("no zygote can be started: %s", error)
            else:
                self._zygote.watch(self._take, self._zygote_ended)

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
            assert self._zygote is not None
            self._zygote.watch(self._take, self._zygote_ended)
            child, zygote = self._child, self._zygote
            status = await self._serve_one(child)
            if child.pid is None and self._zygote is None and zygote.has_forked:
                self._end_child()  # it was asked of one that was killed as well: here no engine died
                continue
            zygote.has_forked = child.pid is not None
            was_ready, self.step_limit_s = self.ready is not None, 0.0
            self._set_ready(None)
            self._died_s = time.monotonic()
            self._fail_inspections()
            if child.pid is None and self._zygote is None:  # which ended before it could fork one
                status = self._zygote_status
            outside = self._was_outside(child, status)
            if not (was_ready or outside):  # the next one is not to begin with what this one did
                self._end_zygote()
            self._end_child()
            stalled = child.was_killed and self._failure.startswith(STALLED)
            death = Death(self._failure or cause_of(status), status, outside, stalled)
            assert self._first_ready is not None
            if not self._first_ready.done():
                return death.cause
            if (fatal := self._bury(death)) is not None:
                return fatal
            await asyncio.sleep(self._in_a_row.pause_s)

    def _was_outside(self, child: EngineChild, status: int | None) -> bool:
        """Whether somebody else has ended it."""
        if self._failure or child.was_killed:
            return False
        if child.pid is None and self._zygote is not None:  # forked, and gone before it could say so
            return True
        return was_sent(status) and oom_kills() == self._num_oom_kills

    def _bury(self, death: Death) -> str | None:
        """Take account of a death after the first engine's start -> why no further one is started, if so."""
        rested = not self._journal and time.monotonic() - self._heard_s > RESTED_S
        got_on = self._journal.advanced or rested
        verdict, culprit = self._journal.lost(outside=death.outside, stalled=death.stalled)
        self.num_restarts += 1
        logger.error(
            "engine died %s suspects=%d restart=%d requests=%d: %s",
            death,
            verdict.num_suspects,
            self.num_restarts,
            len(self._journal),
            death.cause,
        )
        if culprit is not None:
            logger.error("request=%s is given up: it alone ends engines", culprit.request.request_id)
            _end(culprit, "the engine dies whenever it computes this request")
        return self._in_a_row.add(death, got_on=got_on or verdict.is_closer)

    async def _serve_one(self, child: EngineChild) -> int | None:
        """Read from one engine process until it has ended -> its exit status, if there was one."""
        ended = child.ended(self._journal.begun)
        reading = asyncio.create_task(self._read(child))
        try:
            while not ended.done():
                await asyncio.wait(
                    (ended, reading), timeout=self._patience_s(), return_when=asyncio.FIRST_COMPLETED
                )
                if not ended.done() and (reading.done() or self._is_overdue()):
                    if child.pid is None:
                        return None
                    child.kill()
                    await ended
            # What it sent before it died still counts; the replay begins after it. One that is killed before
            # it is ready has nothing to say, and may not even be connected.
            if self.ready is not None or not was_sent(ended.result()):
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

    def _limit_s(self) -> float:
        """How long the engine may be silent now."""
        if self.ready is None:
            return self._start_timeout_s
        limit_s = max(self._stall_timeout_s, self.step_limit_s)
        return limit_s * PATIENT_FACTOR if self._journal.patient else limit_s

    def _patience_s(self) -> float:
        """Until it is to be looked whether the engine is overdue."""
        limit_s = self._limit_s()
        if self.ready is not None and not self._journal:
            return self._stall_timeout_s
        return min(self._stall_timeout_s, max(0.001, self._heard_s + limit_s - time.monotonic()))

    def _is_overdue(self) -> bool:
        """Whether the engine should have said something by now."""
        silent_s, limit_s = time.monotonic() - self._heard_s, self._limit_s()
        if silent_s < limit_s or (self.ready is not None and not self._journal):
            return False
        if self.ready is None:
            self._failure = f"the engine was not ready within engine_start_timeout_s = {limit_s:g}"
        elif limit_s > self._stall_timeout_s:
            self._failure = f"{STALLED} {limit_s:g} s, many times what it was predicted to take"
        else:
            self._failure = f"{STALLED} engine_stall_timeout_s = {limit_s:g}"
        logger.error("%s; it is killed", self._failure)
        return True

    async def _read(self, child: EngineChild) -> None:
        while True:
            self._take(await child.receive())

    def _take(self, message: FromEngine | FromZygote) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, StepOutput):
            self.step_limit_s = 0.0
            if self.on_step is not None:
                try:
                    self.on_step(message)
                except Exception:
                    logger.exception("counting a step failed")
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, Ready):
            self._resume(message)
        elif isinstance(message, LongStep):
            self.step_limit_s = STALL_FACTOR * message.predicted_s
        elif isinstance(message, Inspected):
            answer = self._inspections.get(message.number)
            if answer is not None and not answer.done():
                answer.set_result(message.snapshot)
        elif isinstance(message, Log):
            logger.log(message.level, "%s", message.text)
        elif isinstance(message, Failed):
            self._failure = message.message
        else:
            assert isinstance(message, Loading)  # it lives: more is not in it

    def _set_ready(self, ready: Ready | None) -> None:
        self.ready = ready
        if self.on_change is not None:
            try:
                self.on_change()
            except Exception:
                logger.exception("counting engines failed")

    def _resume(self, ready: Ready) -> None:
        self._set_ready(ready)
        self._zygote_pause_s = FIRST_PAUSE_S
        assert self._child is not None
        self._child.hide()
        assert self._first_ready is not None
        if not self._first_ready.done():
            self._first_ready.set_result(ready)
        if self.num_restarts:
            logger.info("engine goes on, %.2f s after its end", time.monotonic() - self._died_s)
        if self._zygote is None:  # it forked this one, and ended
            self._replace_zygote()
        self._send_all(self._journal.resume())

    def _deliver(self, output: SequenceOutput) -> None:
        news, sink, messages = self._journal.record(output)
        self._send_all(messages)
        if news is None or sink is None:
            return
        try:
            sink(news)
        except Exception:
            logger.exception("delivering to request=%s failed", output.request_id)
            self.abort(output.request_id)

    def _fail_inspections(self) -> None:
        for answer in self._inspections.values():
            if not answer.done():
                answer.set_exception(EngineDead("the engine was lost before it answered"))

    def _give_up(self, cause: str) -> None:
        assert self._death is not None
        if not self._death.done():
            self._death.set_result(cause)
        self.ready = None
        self._fail_inspections()
        entries, self._journal = list(self._journal.entries.values()), Journal()
        for entry in entries:
            _end(entry, cause)

    def _send_all(self, messages: Iterable[ToEngine]) -> None:
        """The journal has some only while an engine is ready."""
        for message in messages:
            assert self._child is not None
            self._child.send(message)


def _end(entry: JournalEntry, cause: str) -> None:
    for index in sorted(entry.live):
        output = SequenceOutput(entry.request.request_id, index, finish=FinishReason.ERROR, error=cause)
        try:
            entry.sink(output)
        except Exception:
            logger.exception("delivering to request=%s failed", entry.request.request_id)
