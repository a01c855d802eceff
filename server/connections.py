"""All connections of a server: how many there may be, and a sweep over their deadlines.

    connection ── there is a place, or an idle connection gives its own up ──> served
        └── none ──> its head is read: a probe is answered, all else gets a 503

Probes thus get their answer whoever else is connected: of the few connections without a place that wait
for their head, the one that has waited longest makes room for the next.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from server import logs

if TYPE_CHECKING:
    import asyncio
    import ssl

    from server.buffers import Buffers
    from server.config import ServerConfig
    from server.metrics import Metrics

SWEEP_S = 1.0  # how often deadlines are looked at, or more often where they are short
PROBE_PLACES = 64  # connections over max_connections whose head is read


class Guest(Protocol):
    """A connection, as far as those of a server are looked after together."""

    loop: asyncio.AbstractEventLoop

    @property
    def is_read(self) -> bool: ...
    @property
    def is_answering(self) -> bool: ...
    def give_way(self) -> None: ...
    def check(self, now_s: float) -> None: ...


class Connections:
    """All connections of a server."""

    def __init__(
        self, limits: ServerConfig, buffers: Buffers, metrics: Metrics, tls: ssl.SSLContext | None
    ) -> None:
        self.tls = tls
        self.limits, self.buffers, self.metrics = limits, buffers, metrics
        self._placed: set[Guest] = set()
        self._idle: dict[Guest, None] = {}  # the longest idle first
        self._surplus: dict[Guest, None] = {}  # the oldest first
        self._is_sweeping = False
        shortest = min(
            (limits.head_timeout_s, limits.body_timeout_s, limits.keep_alive_timeout_s, limits.send_timeout_s)
        )
        self._sweep_s = min(SWEEP_S, shortest / 4)

    def enter(self, connection: Guest) -> bool:
        """Whether there is a place. Else it is one of a few that may be probes, or is closed."""
        if not self._is_sweeping:
            self._is_sweeping = True
            connection.loop.call_later(self._sweep_s, self._sweep, connection.loop)
        if len(self._placed) >= self.limits.max_connections:
            idle = next((other for other in self._idle if other.is_read), None)
            if idle is not None:
                self._evict(idle)
        if len(self._placed) < self.limits.max_connections:
            self._placed.add(connection)
            return True
        if not self._surplus:  # told once per time that the limit is reached
            logs.log(logging.WARNING, "too many connections", max_connections=self.limits.max_connections)
        self._surplus[connection] = None
        if len(self._surplus) > PROBE_PLACES:
            self._evict(next(other for other in self._surplus if not other.is_answering))
        return False

    def _evict(self, connection: Guest) -> None:
        self.leave(connection)  # its place is free at once
        connection.give_way()

    def leave(self, connection: Guest) -> None:
        self._placed.discard(connection)
        self._idle.pop(connection, None)
        self._surplus.pop(connection, None)

    def note_idle(self, connection: Guest, *, idle: bool) -> None:
        if idle:
            self._idle[connection] = None
        else:
            self._idle.pop(connection, None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        for connection in [*self._placed, *self._surplus]:
            connection.check(now_s)
        self._is_sweeping = bool(self._placed or self._surplus)
        if self._is_sweeping:
            loop.call_later(self._sweep_s, self._sweep, loop)
