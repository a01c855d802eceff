"""Limits of one tenant: reached exactly, refilled by the clock, given back, and bounded in memory."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.admission import Admission
from server.errors import ApiError
from server.refusals import Refusal
from server.retry_after import MAX_RETRY_AFTER_S, retry_after
from server.tenants import TenantLimits, duration


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def refused(limits: TenantLimits, tenant: str, places: int = 1) -> Refusal:
    with pytest.raises(Refusal) as caught:
        limits.check(tenant, places)
    assert caught.value.status == 429
    assert int(caught.value.headers["retry-after"]) >= 1
    return caught.value


def test_the_limit_is_reached_exactly_and_places_come_back() -> None:
    admission = Admission(100, tenants=TenantLimits(max_requests=3))
    first = admission.reserve("a", 2)
    admission.reserve("a", 1)
    refusal = refused(admission.tenants, "a")
    assert (refusal.code, refusal.reason) == ("tenant_limit", "tenant_limit")
    assert "3 sequences" in refusal.message
    admission.reserve("b", 3)
    first.release_one()
    admission.reserve("a", 1)
    refused(admission.tenants, "a")
    first.close()
    first.close()
    admission.reserve("a", 1)
    refused(admission.tenants, "a")


def test_a_request_over_the_limit_is_told_that_it_never_fits() -> None:
    with pytest.raises(ApiError) as caught:
        TenantLimits(max_requests=3).check("a", 4)
    assert (caught.value.status, caught.value.param) == (400, "n")


def test_a_refusal_for_a_full_server_leaves_nothing_behind() -> None:
    admission = Admission(2, tenants=TenantLimits(max_requests=2, tokens_per_minute=60))
    ticket = admission.reserve("a", 2)
    for number in range(50):
        with pytest.raises(Refusal):
            admission.reserve(f"t{number}", 1)
    assert admission.tenants.num_remembered == 1
    ticket.close()
    admission.reserve("b", 2)


def test_retry_after_follows_the_tenants_own_completions() -> None:
    clock = Clock()
    limits = TenantLimits(max_requests=4, clock=clock)
    limits.enter("a", 4)
    for _ in range(3):  # one in ten seconds
        clock.now_s += 10
        limits.leave("a", 1, finished=True)
        limits.enter("a", 1)
    assert refused(limits, "a", 1).headers["retry-after"] == "10"
    assert refused(limits, "a", 3).headers["retry-after"] == "30"


def test_a_bucket_empties_into_debt_and_refills_by_the_clock() -> None:
    clock = Clock()
    limits = TenantLimits(tokens_per_minute=60, clock=clock)
    limits.enter("a", 1)
    limits.charge("a", 59)
    limits.check("a", 1)  # one token is left: come in
    limits.charge("a", 1)
    refusal = refused(limits, "a")
    assert (refusal.code, refusal.headers["retry-after"]) == ("rate_limit_exceeded", "1")
    limits.charge("a", 30)
    assert refused(limits, "a").headers["retry-after"] == "31"
    limits.leave("a", 1, finished=True)  # the debt is remembered
    clock.now_s += 30
    assert refused(limits, "a").headers["retry-after"] == "1"
    clock.now_s += 1
    limits.check("a", 1)
    clock.now_s += 10_000
    assert limits.headers("a") == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "0ms",
    }
    limits.check("b", 1)


def test_headers_say_what_is_left_and_when_it_is_full() -> None:
    limits = TenantLimits(tokens_per_minute=600, clock=Clock())
    assert limits.headers("new")["x-ratelimit-remaining-tokens"] == "600"
    limits.enter("a", 1)
    limits.charge("a", 100)
    assert limits.headers("a") == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "10s",
    }
    limits.charge("a", 1100)
    assert limits.headers("a")["x-ratelimit-remaining-tokens"] == "0"
    assert limits.headers("a")["x-ratelimit-reset-tokens"] == "2m0s"
    limits.charge("a", -10_000)
    assert limits.headers("a")["x-ratelimit-remaining-tokens"] == "600"
    assert TenantLimits(max_requests=1).headers("a") == {}


def test_debtors_are_remembered_up_to_a_bound_and_the_busy_always() -> None:
    limits = TenantLimits(max_requests=9, tokens_per_minute=60, clock=Clock(), max_idle=10)
    limits.enter("busy", 1)
    limits.charge("busy", 1000)
    for number in range(1000):
        name = f"forged-{number}-\u202e\x00é"
        limits.enter(name, 1)
        limits.charge(name, 1000)
        limits.leave(name, 1, finished=False)
        assert limits.num_remembered <= 11
    refused(limits, "busy")
    refused(limits, "forged-999-\u202e\x00é")
    limits.check("forged-0-\u202e\x00é", 1)


def test_without_a_rate_nobody_idle_is_remembered() -> None:
    limits = TenantLimits(max_requests=1)
    for number in range(100):
        limits.enter(str(number), 1)
        limits.leave(str(number), 1, finished=True)
    assert limits.num_remembered == 0


@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(0, 200))
def test_any_order_of_events_keeps_the_counts(seed: int, max_requests: int, rate: int) -> None:
    """Against a model that remembers everybody."""
    choose, clock = random.Random(seed), Clock()
    limits = TenantLimits(max_requests, rate, clock=clock)
    in_flight = dict.fromkeys("abc", 0)
    tokens = {name: float(rate) for name in "abc"}
    for _ in range(60):
        name, seconds = choose.choice("abc"), choose.choice((0.0, 0.25, 7.0))
        clock.now_s += seconds
        tokens = {key: min(rate, value + seconds * rate / 60) for key, value in tokens.items()}
        if choose.random() < 0.5:
            may = not (max_requests and in_flight[name] >= max_requests)
            may = may and (not rate or tokens[name] > 1e-6)
            try:
                limits.check(name, 1)
            except Refusal:
                assert not may
                continue
            assert may or tokens[name] > -1e-6
            limits.enter(name, 1)
            in_flight[name] += 1
            used = choose.randrange(100)
            limits.charge(name, used)
            tokens[name] -= used
        elif in_flight[name]:
            limits.leave(name, 1, finished=choose.random() < 0.5)
            in_flight[name] -= 1
    assert limits.num_remembered >= sum(count > 0 for count in in_flight.values())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0004, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (59.2, "1m0s"),
        (90, "1m30s"),
        (7205, "2h0m5s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "1"), (0.2, "1"), (1.01, "2"), (1e9, str(MAX_RETRY_AFTER_S))]
)
def test_retry_after_is_whole_and_bounded(seconds: float, text: str) -> None:
    assert retry_after(seconds) == {"retry-after": text}
