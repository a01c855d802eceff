"""Requests that are not taken: by the server's own limits, or by the engine's scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.refusal import RefusalReason
from server.errors import ApiError, invalid
from server.retry_after import retry_after

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.messages import SequenceOutput


class Refusal(ApiError):
    """`reason` is what octavo:refused_total counts it under: one of a fixed few."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, param=param, code=code or reason, headers=headers)
        self.reason = reason


REASONS = (*(reason.value for reason in RefusalReason), "draining", "tenant_limit", "rate_limit_exceeded")


def draining() -> Refusal:
    return Refusal(503, "The server is shutting down.", reason="draining", headers=retry_after(5))


def engine_error(output: SequenceOutput) -> ApiError:
    """What the client is told of a sequence that ended with FinishReason.ERROR."""
    cause = output.error or "no cause given"
    if output.refusal is not None:
        return _scheduler_refusal(output.refusal, cause, output.retry_after_s)
    if output.refused:
        return invalid(_cannot_be_computed(cause), code="refused_by_engine")
    return ApiError(500, f"The engine could not compute the request: {cause}.", code="engine_error")


def _scheduler_refusal(refusal: RefusalReason, cause: str, wait_s: float) -> Refusal:
    reason = refusal.value
    if refusal is RefusalReason.QUEUE_FULL:
        message = f"The queue is full: {cause}. Retry later."
        return Refusal(429, message, reason=reason, headers=retry_after(wait_s))
    if refusal is RefusalReason.DEADLINE:
        message = f"The deadline cannot be met: {cause}."
        headers = retry_after(wait_s) if wait_s else None  # else it could not be met on an idle machine
        return Refusal(503, message, reason=reason, code="deadline_unmeetable", headers=headers)
    return Refusal(400, _cannot_be_computed(cause), reason=reason, code="refused_by_engine")


def _cannot_be_computed(cause: str) -> str:
    return f"The request cannot be computed: {cause}."
