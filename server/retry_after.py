"""When to come back: whole seconds for Retry-After, and how fast places become free."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_RETRY_AFTER_S = 3600
MAX_ESTIMATE_S = 60  # nobody is sent away for longer on a mere estimate
RATE_WINDOW = 64  # completions that the estimate of the rate looks back on


def retry_after(seconds: float) -> dict[str, str]:
    """The header: rounded up, at least a second and at most MAX_RETRY_AFTER_S."""
    return {"retry-after": str(math.ceil(min(MAX_RETRY_AFTER_S, max(1.0, seconds))))}


class FinishRate:
    """Completions of late, from which follows when so and so many more will have come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=RATE_WINDOW)

    def note(self) -> None:
        """One has finished."""
        self._times.append(self._clock())

    def wait_s(self, places: int) -> float:
        """Seconds until that many places are likely free; 1 while nothing is known."""
        times = self._times
        if len(times) < 2:
            return 1.0
        rate = (len(times) - 1) / max(self._clock() - times[0], 1e-3)
        return min(MAX_ESTIMATE_S, places / rate)
