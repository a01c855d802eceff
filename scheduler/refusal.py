"""Why a request is not accepted."""

from __future__ import annotations

import enum


class RefusalReason(enum.StrEnum):
    EMPTY = "empty"  # no prompt token, or no choice
    CONTEXT = "context"  # the prompt leaves no room in the model's context
    MEMORY = "memory"  # prompt and output can never fit the KV pages
    INVALID = "invalid"  # the engine cannot compute it
    QUEUE_FULL = "queue_full"  # come back later
    DEADLINE = "deadline"  # it cannot be met: come back later, or ask for more time
    DUPLICATE = "duplicate"  # a request of this id is alive


class RequestRefused(ValueError):
    """`wanted` and `limit` are the two numbers that do not fit: tokens, requests in the queue, seconds.
    `retry_after_s`: when it may fit; 0 where waiting does not help."""

    def __init__(
        self,
        reason: RefusalReason,
        message: str,
        wanted: float = 0,
        limit: float = 0,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.wanted = wanted
        self.limit = limit
        self.retry_after_s = retry_after_s
