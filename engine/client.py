"""How the server talks to an engine: one interface, two transports (another process, this process)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine.messages import Ready, SequenceOutput, StepOutput
from scheduler.types import Request

Sink = Callable[[SequenceOutput], None]


class EngineDead(Exception):
    """The engine cannot start, or died more often than it may be restarted. The text is one line."""


class EngineClient(Protocol):
    """All methods are called on the asyncio loop; sinks are called there too, and must not block."""

    ready: Ready | None  # None until start() returned, and again while the engine restarts
    on_step: Callable[[StepOutput], None] | None  # called for every step output before its sinks

    async def start(self) -> Ready:
        """Wait until the engine can compute. Raises EngineDead with the cause in one line."""
        ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Send a request; `sink` hears of each of its choices until every one has had its terminal
        output. Survives a restart of the engine: the request is replayed with what was delivered."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End one choice or the whole request. An unknown one is ignored. No sink call follows for
        a whole request that was aborted; an aborted single choice still gets its terminal output."""
        ...

    async def died(self) -> EngineDead:
        """Wait until a started engine is gone for good, and say why. Cancelled when nobody asks."""
        ...

    async def close(self) -> None: ...
