"""Why a request is not accepted."""

from __future__ import annotations

import enum


class RefusalReason(enum.StrEnum):
    EMPTY = "empty"  # no prompt token, or no choice
    CONTEXT = "context"  # the prompt leaves no room in the model's context
    MEMORY = "memory"  # prompt and output can never fit the KV pages
    QUEUE_FULL = "queue_full"  # come back later
    DUPLICATE = "duplicate"  # a request of this id is alive


class RequestRefused(ValueError):
    """`wanted` and `limit` are the two numbers that do not fit: tokens, or requests in the queue."""

    def __init__(self, reason: RefusalReason, message: str, wanted: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.wanted = wanted
        self.limit = limit
