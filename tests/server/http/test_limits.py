"""Tenants over HTTP: who one is, limits that hold under attack, refusals by the engine, the admin's view."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from scheduler.refusal import RefusalReason
from server.auth import key_names
from server.config import ServerConfig
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import Running, running
from tests.server.http.test_bad_input import check_envelope
from tests.server.http.test_disconnect import raw_request, within

if TYPE_CHECKING:
    import httpx

PATH = "/v1/completions"


def bearer(key: str) -> dict[str, bytes]:
    return {"authorization": f"Bearer {key}".strip().encode()}


def complete(server: Running, key: str | None = None, **body: Any) -> httpx.Response:
    headers = {} if key is None else bearer(key)
    return server.post(PATH, {"prompt": "hi", "max_tokens": 1, **body}, headers=headers)


# Who the tenant is


def test_the_tenant_is_the_keys_name_and_no_user_escapes_it() -> None:
    with running(api_keys=("k1", "k2", "k3"), api_key_names=("anna", "bert", "anna")) as server:
        for key, body in (("k1", {}), ("k1", {"user": "bert"}), ("k3", {"user": ""}), ("k2", {"user": "x"})):
            assert complete(server, key, **body).status_code == 200
        messages = {"messages": [{"role": "user", "content": "x"}], "user": "bert"}
        assert server.post("/v1/chat/completions", messages, headers=bearer("k1")).status_code == 200
        assert [request.tenant for request in server.engine.requests] == [
            "anna",
            "anna",
            "anna",
            "bert",
            "anna",
        ]


def test_unnamed_keys_are_called_by_a_hash_that_stays() -> None:
    keys = ("sk-verysecret", "other")
    names = key_names(ServerConfig(api_keys=keys))
    assert len(set(names)) == 2
    assert key_names(ServerConfig(api_keys=keys[::-1])) == names[::-1]
    assert not any(key in name for name in names for key in keys)
    with running(api_keys=keys) as server:
        complete(server, keys[0])
        assert server.engine.requests[-1].tenant == names[0]


def test_with_keys_every_tenant_has_a_cache_of_its_own() -> None:
    """No two of (tenant, cache_salt) share one, however names and salts are put together."""
    asked = [(key, salt) for key in ("k1", "k2") for salt in (None, "b", "bc", '", "b', "a", '["a", ""]')]
    with running(api_keys=("k1", "k2", "k3"), api_key_names=("a", "ab", "a")) as server:
        for key, salt in asked:
            complete(server, key, cache_salt=salt)
        own = [request.cache_salt for request in server.engine.requests]
        complete(server, "k3")  # another key of the first tenant
        assert server.engine.requests[-1].cache_salt == own[0]
    with running() as server:
        for _, salt in asked[:6]:
            complete(server, cache_salt=salt, user="a")
        complete(server, cache_salt=own[0])  # nobody can spell what a tenant's is called
        everyones = [request.cache_salt for request in server.engine.requests]
    assert len({*own, *everyones}) == len(own) + len(everyones)
    assert all(len(salt) <= 32 for salt in (*own, *everyones))


def test_tenants_share_a_cache_where_the_operator_says_so() -> None:
    with running(api_keys=("k1", "k2"), tenants_share_cache=True) as server:
        for key in ("k1", "k2"):
            for salt in (None, "salt"):
                complete(server, key, cache_salt=salt)
        salts = [request.cache_salt for request in server.engine.requests]
    assert salts[:2] == salts[2:]
    assert salts[0] == "" != salts[1]


@pytest.mark.parametrize("user", ["", "someone", "Zoë \u202e\u0000\U0001f600", "a" * 512])
def test_without_keys_the_tenant_is_who_the_client_says(server: Running, user: str) -> None:
    assert complete(server, user=user).status_code == 200
    assert server.engine.requests[-1].tenant == user


# Sequences in flight


def test_a_tenant_at_its_limit_waits_for_itself_alone() -> None:
    with running(FakeEngine(step_s=0.02), max_tenant_requests=2) as server:
        long = threading.Thread(
            target=complete, args=(server,), kwargs={"user": "a", "n": 2, "max_tokens": 50}
        )
        long.start()
        within(5, lambda: server.service.admission.in_flight == 2)
        refused = complete(server, user="a")
        assert refused.status_code == 429
        assert check_envelope(refused.json())["code"] == "tenant_limit"
        assert check_envelope(refused.json())["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        assert complete(server, user="b").status_code == 200
        long.join()
        assert complete(server, user="a", n=2).status_code == 200
        assert complete(server, user="a", n=3).status_code == 400
        assert server.metrics()['octavo:refused_total{model_name="org/fake",reason="tenant_limit"}'] == 1


def test_forged_users_of_one_key_share_its_limit() -> None:
    with running(FakeEngine(stuck=True), api_keys=("k", "l"), max_tenant_requests=3) as server:

        def attack(number: int) -> int:
            return complete(server, "k", user=f"forged-{number}", timeout_s=0.5).status_code

        with ThreadPoolExecutor(12) as pool:
            statuses = list(pool.map(attack, range(12)))
        assert sorted(statuses) == [429] * 9 + [504] * 3
        assert server.service.admission.in_flight == 0
        server.engine.stuck = False
        assert complete(server, "l").status_code == 200


def test_a_disconnect_gives_the_place_back() -> None:
    with running(FakeEngine(step_s=0.02), max_tenant_requests=1, tenant_tokens_per_minute=10**6) as server:
        for stream in (True, False):
            body = {"prompt": "x", "max_tokens": 200, "user": "a", "stream": stream}
            connection = raw_request(server, PATH, body)
            within(5, lambda: bool(server.engine.live))
            assert complete(server, user="a").status_code == 429
            connection.close()
            within(1, lambda: server.service.admission.in_flight == 0)
            assert complete(server, user="a").status_code == 200


def test_a_request_that_fails_before_the_engine_gives_its_place_back() -> None:
    with running(max_tenant_requests=1, tenant_tokens_per_minute=1000) as server:
        for _ in range(3):
            assert complete(server, user="a", prompt="x" * 1000).status_code == 400
        answer = complete(server, user="a")
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-tokens"] == "997"


# Tokens per minute


def test_tokens_are_charged_as_used_and_the_answer_says_what_is_left() -> None:
    with running(tenant_tokens_per_minute=100) as server:
        whole = complete(server, user="a", prompt="p" * 20, max_tokens=30)
        left = int(whole.headers["x-ratelimit-remaining-tokens"])
        assert whole.headers["x-ratelimit-limit-tokens"] == "100"
        assert 50 <= left <= 52  # 20 + 30 were used; a little has come back
        streamed = complete(server, user="a", prompt="p" * 20, max_tokens=80, stream=True)
        assert int(streamed.headers["x-ratelimit-remaining-tokens"]) <= 34  # the prompt's tokens are off
        assert streamed.text.endswith("[DONE]\n\n")
        refused = complete(server, user="a")
        assert refused.status_code == 429
        assert check_envelope(refused.json())["code"] == "rate_limit_exceeded"
        assert 25 <= int(refused.headers["retry-after"]) <= 31  # 50 tokens of debt at 100 a minute
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert refused.headers["x-ratelimit-reset-tokens"] in ("1m28s", "1m29s", "1m30s")
        assert complete(server, user="b").status_code == 200
        reason = 'octavo:refused_total{model_name="org/fake",reason="rate_limit_exceeded"}'
        assert server.metrics()[reason] == 1


def test_a_request_that_the_engine_refuses_costs_nothing() -> None:
    engine = FakeEngine(error="1024 requests wait", refusal=RefusalReason.QUEUE_FULL, retry_after_s=2.1)
    with running(engine, tenant_tokens_per_minute=1000) as server:
        for _ in range(3):
            assert complete(server, user="a", prompt=["p" * 100, "q" * 50], n=2).status_code == 429
        engine.error = None
        assert complete(server, user="a").headers["x-ratelimit-remaining-tokens"] == "997"


def test_no_limit_no_headers(server: Running) -> None:
    assert not any(name.startswith("x-ratelimit") for name in complete(server).headers)


def test_memory_of_tenants_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tenant_tokens_per_minute=100) as server:
        server.service.admission.tenants._max_idle = 5
        for number in range(20):
            assert complete(server, user=f"ü{number}").status_code == 200
        assert server.service.admission.tenants.num_remembered <= 5


# Refusals by the engine


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "wait_s", "status", "code", "retry_after"),
    [
        (RefusalReason.QUEUE_FULL, 2.1, 429, "queue_full", "3"),
        (RefusalReason.QUEUE_FULL, 0.0, 429, "queue_full", "1"),
        (RefusalReason.DEADLINE, 17.0, 503, "deadline_unmeetable", "17"),
        (RefusalReason.DEADLINE, 1e9, 503, "deadline_unmeetable", "3600"),
        (RefusalReason.DEADLINE, 0.0, 503, "deadline_unmeetable", None),
        (RefusalReason.CONTEXT, 0.0, 400, "refused_by_engine", None),
        (RefusalReason.MEMORY, 0.0, 400, "refused_by_engine", None),
        (RefusalReason.DUPLICATE, 0.0, 400, "refused_by_engine", None),
        (RefusalReason.INVALID, 0.0, 400, "refused_by_engine", None),
        (RefusalReason.EMPTY, 0.0, 400, "refused_by_engine", None),
    ],
)
def test_a_refusal_has_its_own_status_streaming_or_not(
    stream: bool, refusal: RefusalReason, wait_s: float, status: int, code: str, retry_after: str | None
) -> None:
    cause = "it would take 20.50 s, and its deadline is in 3.00 s"
    with running(FakeEngine(error=cause, refusal=refusal, retry_after_s=wait_s)) as server:
        chat = {"messages": [{"role": "user", "content": "x"}], "n": 2, "stream": stream}
        for answer in (
            complete(server, stream=stream),
            server.post("/v1/chat/completions", chat),
        ):
            assert answer.status_code == status
            error = check_envelope(answer.json())
            assert error["code"] == code
            assert cause in error["message"]
            assert answer.headers.get("retry-after") == retry_after
        assert server.service.admission.in_flight == 0
        refused = f'octavo:refused_total{{model_name="org/fake",reason="{refusal}"}}'
        assert server.metrics()[refused] == 2


# GET /debug/scheduler

DEBUG = "/debug/scheduler"


def test_the_admin_sees_who_runs_and_no_word_of_a_prompt() -> None:
    engine = FakeEngine(step_s=0.02)
    with running(engine, admin_key="ädmin", api_keys=("k",), api_key_names=("anna",)) as server:
        long = threading.Thread(
            target=complete, args=(server, "k"), kwargs={"prompt": "zanzibar", "n": 3, "max_tokens": 60}
        )
        long.start()
        within(5, lambda: len(engine.live) == 3)
        answer = server.get(DEBUG, headers=bearer("ädmin"))
        assert answer.status_code == 200
        state = answer.json()
        assert (state["policy"], state["num_steps"]) == ("mlfq", 7)
        assert state["stats"]["levels"][0]["num_running"] == 3
        assert state["costs"]["step_s"] > 0
        assert {piece["tenant"] for piece in state["sequences"]} == {"anna"}
        assert [piece["index"] for piece in state["sequences"]] == [0, 1, 2]
        assert state["sequences"][0]["state"] == "running"
        assert state["tenants"][0]["num_live"] == 3
        assert "zanzibar" not in answer.text
        assert "122" not in json.dumps(state["sequences"])  # nor its tokens
        one = server.get(f"{DEBUG}?limit=1", headers=bearer("ädmin")).json()
        assert len(one["sequences"]) == 1
        assert server.get(f"{DEBUG}?limit=0", headers=bearer("ädmin")).json()["sequences"] == []
        long.join()


def test_only_the_admin_key_opens_the_debug_route() -> None:
    with running(admin_key="admin", api_keys=("k",)) as server:
        for headers in (
            {},
            bearer("k"),
            bearer("admi"),
            bearer("admins"),
            bearer(""),
            {"authorization": "admin"},
        ):
            answer = server.get(DEBUG, headers=headers)
            assert answer.status_code == 401
            assert check_envelope(answer.json())["code"] == "invalid_api_key"
        assert server.get("/v1/models", headers=bearer("admin")).status_code == 401
        assert server.post(DEBUG, {}, headers=bearer("admin")).status_code == 405
    with running(admin_key="admin") as server:
        assert server.get(DEBUG).status_code == 401
        assert server.get(DEBUG, headers=bearer("admin")).status_code == 200
        assert server.get("/v1/models").status_code == 200


def test_without_an_admin_key_there_is_no_debug_route() -> None:
    with running(api_keys=("k",)) as server:
        assert server.get(DEBUG).status_code == 401
        answer = server.get(DEBUG, headers=bearer("k"))
        assert (answer.status_code, check_envelope(answer.json())["code"]) == (404, "unknown_route")
    with running() as server:
        for headers in ({}, bearer(""), bearer("x")):
            assert server.get(DEBUG, headers=headers).status_code == 404


@pytest.mark.parametrize("limit", ["-1", "10001", "x", "1.5", "1e3"])
def test_a_bad_limit_is_400(limit: str) -> None:
    with running(admin_key="admin") as server:
        answer = server.get(f"{DEBUG}?limit={limit}", headers=bearer("admin"))
        assert answer.status_code == 400
        assert check_envelope(answer.json())["param"] == "limit"


def test_an_engine_that_is_not_there_or_does_not_answer_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.routes.debug.INSPECTION_TIMEOUT_S", 0.1)
    with running(FakeEngine(stuck=True), admin_key="admin") as server:
        answer = server.get(DEBUG, headers=bearer("admin"))
        assert (answer.status_code, check_envelope(answer.json())["code"]) == (503, "stalled")
        server.engine.ready = None
        answer = server.get(DEBUG, headers=bearer("admin"))
        assert (answer.status_code, check_envelope(answer.json())["code"]) == (503, "loading")
        assert int(answer.headers["retry-after"]) >= 1


def test_names_that_clients_chose_are_shown_printable() -> None:
    with running(FakeEngine(step_s=0.02), admin_key="admin") as server:
        name = "evil\x1b[31m\u202e\n" + "x" * 400
        long = threading.Thread(target=complete, args=(server,), kwargs={"user": name, "max_tokens": 40})
        long.start()
        within(5, lambda: bool(server.engine.live))
        state = server.get(DEBUG, headers=bearer("admin")).json()
        long.join()
        for shown in (state["tenants"][0]["tenant"], state["sequences"][0]["tenant"]):
            assert shown.isprintable()
            assert len(shown) < 210


def test_the_debug_route_is_in_the_openapi_document(server: Running) -> None:
    document = server.get("/openapi.json").json()
    operation = document["paths"][DEBUG]["get"]
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("State")
    assert [parameter["name"] for parameter in operation["parameters"]] == ["limit"]
    assert {"SchedulerState", "SequenceView", "LevelStats", "CostModel"} <= set(
        document["components"]["schemas"]
    )
