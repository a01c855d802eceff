"""How engines end: by whom, in words for the log, and how many in a row are enough."""

from __future__ import annotations

import signal
from typing import NamedTuple

# Signals that somebody sends: an engine that ends by one of them, and not by us or for want of memory, did
# nothing wrong, nor did any request.
SENT_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# Of a death in a row without progress that came from outside, against one of the engine's own: whoever kills
# engines faster than they can get on shall have to do it for minutes.
OUTSIDE_WEIGHT = 0.01
# Before the second start in a row that follows a death at once; twice as long before each further one.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 60.0


class Death(NamedTuple):
    cause: str  # one line
    status: int | None  # of the process, where it is known
    outside: bool = False  # somebody else has ended it
    stalled: bool = False  # it was killed for its silence

    def __str__(self) -> str:
        whose = "outside" if self.outside else "stall" if self.stalled else "engine"
        return f"{shown(self.status)} cause={whose}"


class InARow:
    """Deaths in which nothing got on."""

    def __init__(self, most: int) -> None:
        """`most`: of the engine's own, after which another is started."""
        self._most = most
        self._num = 0
        self._weight = 0.0

    def add(self, death: Death, *, got_on: bool) -> str | None:
        """-> why no further engine is started, if so"""
        if got_on:
            self._num, self._weight = 0, 0.0
        self._num += 1
        self._weight += OUTSIDE_WEIGHT if death.outside else 1.0
        if self._weight > self._most:
            return f"{death.cause}; it died {self._num} times in a row, and nothing got on in between"
        return None

    @property
    def pause_s(self) -> float:
        """Until the next start: none after the first death."""
        return min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._weight - 2)) if self._weight > 1 else 0.0


def was_sent(status: int | None) -> bool:
    return status is not None and -status in SENT_SIGNALS


def oom_kills() -> int:
    """Processes that the system has killed for want of memory; 0 where it does not tell."""
    try:
        with open("/proc/vmstat", encoding="ascii") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def shown(status: int | None) -> str:
    if status is None:
        return "status=unknown"
    names = {one.value: one.name for one in signal.Signals}
    return f"signal={names.get(-status, -status)}" if status < 0 else f"status={status}"


def cause_of(status: int | None) -> str:
    if status is None:
        return "the engine process ended"
    cause = f"the engine process ended with status {status}"
    return cause + {
        -signal.SIGBUS: " (SIGBUS): a file that it read shrank, or its disk failed",
        -signal.SIGKILL: " (SIGKILL): somebody sent it, or the system's memory ran out",
    }.get(status, "")
