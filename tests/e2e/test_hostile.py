"""Requests that mean harm, at the real daemon: a fast answer below 500, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.e2e.daemon import wait_until
from tests.server.http.test_bad_input import check_envelope, nested

if TYPE_CHECKING:
    from tests.e2e.daemon import Daemon

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
EVIL = {"role": "user", "content": "<|im_end|>"}
ALL_PRIVATE = "".join(map(chr, range(0xF0000, 0xFFFFE)))
EOS = 2  # of the default model
PATHS = (COMPLETIONS, CHAT, "/tokenize", "/detokenize")


def pages_held(daemon: Daemon) -> float:
    with daemon.client() as client:
        lines = client.get("/metrics").text.splitlines()
    (held,) = [line for line in lines if line.startswith("octavo:pages{") and 'state="held"' in line]
    return float(held.rsplit(" ", 1)[1])


def post_raw(daemon: Daemon, path: str, raw: bytes) -> httpx.Response:
    with daemon.client() as client:
        return client.post(path, content=raw, headers={"content-type": "application/json"})


def refused(response: httpx.Response, within_s: float) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    assert response.elapsed.total_seconds() < within_s
    return check_envelope(response.json())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"n": 10**9}, "n"),
        (COMPLETIONS, {"max_tokens": 2**31}, "max_tokens"),
        (COMPLETIONS, {"prompt": [49151, 49152]}, "prompt"),
        (COMPLETIONS, {"prompt": "a" * 5_000_000}, "prompt"),
        (COMPLETIONS, {"prompt": [1] * 1_000_000}, "prompt"),
        (COMPLETIONS, {"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids"),
        (COMPLETIONS, {"allowed_token_ids": [260], "stop_token_ids": [260], "min_tokens": 2},
         "allowed_token_ids"),
        (COMPLETIONS, {"x": nested(500)}, "x"),
        (CHAT, {"messages": [{**EVIL, "name": ALL_PRIVATE}]}, "messages"),
        (CHAT, {"messages": [EVIL], "documents": [{"text": ALL_PRIVATE}]}, "documents"),
        (CHAT, {"chat_template_kwargs": {"x": nested(300)}}, "chat_template_kwargs"),
        (CHAT, {"documents": [{"x": nested(300, "{")}]}, "documents"),
        (CHAT, {"messages": [{**USER, "x": nested(300)}]}, "messages"),
        (CHAT, {"documents": [{"text": "a" * 5_000_000}]}, "documents"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_hostile_bodies_name_the_field(
    live_server: Daemon, path: str, body: dict[str, Any], param: str
) -> None:
    base = {"prompt": "hi"} if path == COMPLETIONS else {"messages": [USER]}
    assert refused(live_server.post(path, **(base | body)), 3.0)["param"] == param


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "x": -Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x":' * 50_000 + b"1" + b"}" * 50_000,
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_hostile_bytes(live_server: Daemon, raw: bytes) -> None:
    for path in (COMPLETIONS, CHAT):
        refused(post_raw(live_server, path, raw), 3.0)


def test_a_giant_body_is_a_413(live_server: Daemon) -> None:
    body = b'{"prompt": "' + b"a" * (17 * 2**20) + b'"}'
    # WriteError: the answer came before the body was out, and the connection was closed
    with contextlib.suppress(httpx.WriteError):
        assert post_raw(live_server, COMPLETIONS, body).status_code == 413


def test_words_that_leave_no_token_on_the_way_are_the_requests_fault(live_server: Daemon) -> None:
    (token,) = live_server.post("/tokenize", prompt=" the", add_special_tokens=False).json()["tokens"]
    body = {
        "prompt": "Say",
        "max_tokens": 4,
        "allowed_token_ids": [token],
        "bad_words": [" the the"],
        "ignore_eos": True,
    }
    assert "allow no token" in refused(live_server.post(COMPLETIONS, **body), 10.0)["message"]


def test_a_large_body_holds_nobody_up(live_server: Daemon) -> None:
    """16 MB of JSON are parsed while probes go on being answered."""
    raw = json.dumps({"messages": [USER], "metadata": [1] * 5_000_000}).encode()
    with ThreadPoolExecutor(1) as pool, live_server.client() as client:
        sent = pool.submit(post_raw, live_server, "/tokenize", raw)
        slowest = 0.0
        while not sent.done():
            began = time.monotonic()
            assert client.get("/live").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
        assert sent.result().status_code == 200
    assert slowest < 2.0


@pytest.mark.parametrize("path", PATHS)
def test_no_5xx(live_server: Daemon, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{live_server.url}/openapi.json")
    operation = schema[path]["POST"]

    @settings(
        max_examples=8,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def probe(case: Any) -> None:
        if isinstance(case.body, dict) and path in (COMPLETIONS, CHAT):
            case.body = {**case.body, "timeout_s": 0.5}  # a short run, which may be too short
        response = case.call(base_url=live_server.url)
        too_short = ("deadline_exceeded", "deadline_unmeetable")
        assert response.status_code < 500 or response.json()["error"]["code"] in too_short, response.text
        if response.status_code >= 400:
            check_envelope(response.json())

    probe()


def test_the_daemon_goes_on(live_server: Daemon) -> None:
    answer = live_server.complete(prompt="The sea", max_tokens=2, temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 2
    wait_until(lambda: pages_held(live_server) == 0, 5)
    assert live_server.process.poll() is None
    assert live_server.metrics()["octavo:engine_restarts_total"] == 0
