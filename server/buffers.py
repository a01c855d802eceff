"""How much of requests and answers is held in memory, over all connections: one budget in two halves.

What arrives (heads, bodies until their request is accepted) has one half and is refused beyond it. What
leaves (tokens that nobody has fetched yet, bytes that a client does not read) has the other: beyond it the
largest holder is ended. So neither can take the other's place, and nobody pays for a reader that sleeps.
All calls come from the event loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Buffers:
    def __init__(self, max_bytes: int) -> None:
        self.incoming = Incoming(max_bytes // 2)
        self.outgoing = Outgoing(max_bytes // 2)


class Incoming:
    """Bytes received for requests that are not accepted yet."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def has_room(self, held: int, more: int) -> bool:
        """For more from one who holds some. Whoever is alone always has: `max_body_bytes` bounds it."""
        return self.num_bytes == held or self.num_bytes + more <= self.max_bytes

    def take(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        assert self.num_bytes >= 0


class Outgoing:
    """Output that is ready and was not sent, by who holds it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._holders: set[Backlog] = set()

    def open(self, abandon: Callable[[], None]) -> Backlog:
        """`abandon` ends the holder; it is called when that has the most and all have too much."""
        return Backlog(self, abandon)

    def _changed(self, backlog: Backlog, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if backlog.num_bytes:
            self._holders.add(backlog)
        else:
            self._holders.discard(backlog)
        while self.num_bytes > self.max_bytes and self._holders:
            largest = max(self._holders, key=lambda holder: holder.num_bytes)
            largest.close()
            largest.abandon()


class Backlog:
    """What one holder has."""

    __slots__ = ("_outgoing", "abandon", "closed", "num_bytes")

    def __init__(self, outgoing: Outgoing, abandon: Callable[[], None]) -> None:
        self._outgoing = outgoing
        self.abandon = abandon
        self.num_bytes = 0
        self.closed = False

    def add(self, num_bytes: int) -> None:
        """Negative: that much was sent."""
        if num_bytes and not self.closed:
            self.num_bytes += num_bytes
            self._outgoing._changed(self, num_bytes)

    def close(self) -> None:
        """Nothing counts any more, and nothing will. Idempotent."""
        self.add(-self.num_bytes)
        self.closed = True
