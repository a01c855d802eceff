"""Warnings of what may happen a thousand times a second: with every page, where a disk is full or damaged."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

logger = logging.getLogger("octavo.engine")

WARN_EVERY_S: Final = 60.0


class RareWarnings:
    """The first of a kind is logged at once; of those that follow one every `WARN_EVERY_S`, with the number
    that was kept back. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged_s: dict[Hashable, float] = {}
        self._kept_back: Counter[Hashable] = Counter()

    def warn(self, kind: Hashable, message: str, *arguments: object) -> None:
        now_s = self._clock()
        if kind in self._logged_s and now_s - self._logged_s[kind] < WARN_EVERY_S:
            self._kept_back[kind] += 1
            return
        self._logged_s[kind] = now_s
        if count := self._kept_back.pop(kind, 0):
            message, arguments = f"{message} (and %d times since it was last logged)", (*arguments, count)
        logger.warning(message, *arguments)
