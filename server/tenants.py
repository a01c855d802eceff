"""What one tenant may use: sequences in flight, and tokens a minute.

The tokens are a bucket that holds a minute's worth and refills continuously. A request comes in while there
is anything in it, its prompt is charged when it is tokenised, its output as it is delivered; so the bucket
may go below zero by what the requests in flight still produce, and stays closed until that is paid back.

A tenant is an API key's name where keys are configured, and then there are never more of them than keys.
Else it is what the client says it is: limits then keep order among the honest. The idle are remembered up
to a bound, the latest ones.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.errors import invalid
from server.refusals import Refusal
from server.retry_after import FinishRate, retry_after

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_IDLE_TENANTS = 10_000  # remembered for what they owe
MINUTE_S = 60.0


@dataclass(slots=True, eq=False)
class Account:
    finished: FinishRate
    tokens: float  # in the bucket at `counted_s`; below zero it is a debt
    counted_s: float
    in_flight: int = 0


class TenantLimits:
    """0 = no limit. Used on the event loop only."""

    def __init__(
        self,
        max_requests: int = 0,
        tokens_per_minute: int = 0,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_idle: int = MAX_IDLE_TENANTS,
    ) -> None:
        self._max_requests = max_requests
        self._capacity = tokens_per_minute
        self._clock = clock
        self._max_idle = max_idle
        self._active: dict[str, Account] = {}
        self._idle: OrderedDict[str, Account] = OrderedDict()

    @property
    def num_remembered(self) -> int:
        return len(self._active) + len(self._idle)

    def check(self, tenant: str, places: int) -> None:
        """Raise the 429 of a limit that is reached, or the 400 of a request that is larger than it."""
        if self._max_requests and places > self._max_requests:
            message = f"The request asks for {places} sequences; a tenant may have {self._max_requests}."
            raise invalid(message, "n")
        account = self._find(tenant)
        if account is None:
            return
        self._refill(account)
        if self._capacity and account.tokens <= 0:
            raise self._rate_exceeded(tenant, account)
        if self._max_requests and account.in_flight + places > self._max_requests:
            message = (
                f"{account.in_flight} sequences of this tenant are in flight, at most {self._max_requests} "
                "may be. Retry later."
            )
            headers = retry_after(account.finished.wait_s(places)) | self.headers(tenant)
            raise Refusal(429, message, reason="tenant_limit", headers=headers)

    def enter(self, tenant: str, places: int) -> None:
        """Count sequences that begin. `check` comes before it."""
        account = self._active.get(tenant)
        if account is None:
            account = self._idle.pop(tenant, None) or self._new()
            self._active[tenant] = account
        account.in_flight += places

    def leave(self, tenant: str, places: int, *, finished: bool) -> None:
        """Take back what `enter` counted; `finished` if it was served to its end."""
        if not places:
            return
        account = self._active[tenant]
        account.in_flight -= places
        assert account.in_flight >= 0
        if finished:
            account.finished.note()
        if not account.in_flight:
            self._rest(tenant)

    def charge(self, tenant: str, tokens: int) -> None:
        """Take tokens from the bucket; a negative number gives them back."""
        if not self._capacity:
            return
        account = self._find(tenant)
        if account is not None:
            self._refill(account)
            account.tokens = min(self._capacity, account.tokens - tokens)

    def headers(self, tenant: str) -> dict[str, str]:
        """The state of the bucket in OpenAI's headers; none without a limit."""
        if not self._capacity:
            return {}
        account = self._find(tenant)
        tokens = float(self._capacity)
        if account is not None:
            self._refill(account)
            tokens = account.tokens
        until_full_s = (self._capacity - tokens) * MINUTE_S / self._capacity
        return {
            "x-ratelimit-limit-tokens": str(self._capacity),
            "x-ratelimit-remaining-tokens": str(max(0, int(tokens))),
            "x-ratelimit-reset-tokens": duration(until_full_s),
        }

    def _find(self, tenant: str) -> Account | None:
        return self._active.get(tenant) or self._idle.get(tenant)

    def _new(self) -> Account:
        return Account(FinishRate(self._clock), float(self._capacity), self._clock())

    def _rest(self, tenant: str) -> None:
        """Nothing of the tenant is in flight: remember what it owes, if there is anything to owe."""
        account = self._active.pop(tenant)
        if self._capacity:
            self._idle[tenant] = account
            if len(self._idle) > self._max_idle:
                self._idle.popitem(last=False)

    def _refill(self, account: Account) -> None:
        now = self._clock()
        earned = (now - account.counted_s) * self._capacity / MINUTE_S
        account.tokens = min(self._capacity, account.tokens + earned)
        account.counted_s = now

    def _rate_exceeded(self, tenant: str, account: Account) -> Refusal:
        wait_s = int(-account.tokens * MINUTE_S / self._capacity) + 1  # then there is more than nothing in it
        message = f"This tenant has used its {self._capacity} tokens per minute. Retry in {wait_s} s."
        headers = retry_after(wait_s) | self.headers(tenant)
        return Refusal(429, message, reason="rate_limit_exceeded", headers=headers)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 6s, 1m30s, 2h0m5s; rounded up."""
    if seconds < 1:
        return f"{-int(-seconds * 1000 // 1)}ms"
    whole = -int(-seconds // 1)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
