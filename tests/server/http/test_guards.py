"""Keys, CORS, the body limit, request ids, the queue's bound, readiness."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from tests.server.byte_tokenizer import ByteTokenizer
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import PlainTemplate, Running, running
from tests.server.http.sockets import connect
from tests.server.http.test_bad_input import check_envelope
from tests.server.http.test_disconnect import within

GUARDED = [
    *("/v1/models", "/version", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json", "/tokenizer_info"),
    *("/nowhere", "//live", "/live/x", "/v1/models/", "/version/"),
]


def test_keys_guard_everything_but_probes() -> None:
    with running(api_keys=("first", "sécond")) as server:
        for path in GUARDED:
            response = server.get(path)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert check_envelope(response.json())["code"] == "invalid_api_key"
            assert "x-request-id" in response.headers
        for path in ("/live", "/health", "/ping", "/metrics", "/health/"):
            assert server.get(path).status_code == 200
        for key in ("first", "sécond"):
            authorization = {"authorization": f"Bearer {key}".encode()}
            assert server.get("/v1/models", headers=authorization).status_code == 200
        for wrong in (
            b"Bearer firs",
            b"Bearer firstt",
            b"Basic first",
            b"first",
            b"Bearer x",
            b"Bearer \xff",
        ):
            assert server.get("/v1/models", headers={"authorization": wrong}).status_code == 401


@pytest.mark.parametrize("keys", [("",), ("", "k")])
def test_an_empty_key_opens_nothing(keys: tuple[str, ...]) -> None:
    with running(api_keys=keys) as server:
        for offered in ("Bearer", "bearer", ""):
            assert server.get("/v1/models", headers={"authorization": offered}).status_code == 401
        assert server.get("/v1/models").status_code == 401
        allowed = server.get("/v1/models", headers={"authorization": "Bearer k"}).status_code
        assert allowed == (200 if "k" in keys else 401)


def test_metrics_may_be_guarded() -> None:
    with running(api_keys=("k",), metrics_require_key=True) as server:
        assert server.get("/metrics").status_code == 401
        assert server.get("/metrics", headers={"authorization": "Bearer k"}).status_code == 200


def test_cors_preflight_passes_without_a_key() -> None:
    with (
        running(api_keys=("k",), cors_allow_origins=("https://a.example",)) as server,
        server.client() as client,
    ):
        asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
        allowed = client.options("/v1/completions", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = client.options("/v1/completions", headers=asked | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in refused.headers
        answer = client.get(
            "/v1/models", headers={"origin": "https://a.example", "authorization": "Bearer k"}
        )
        assert answer.headers["access-control-allow-origin"] == "https://a.example"


ASKED = (  # the headers of openai-node, and of siblings
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout",
    "authorization,content-type,openai-organization,openai-project,openai-beta,user-agent",
    "anthropic-dangerous-direct-browser-access,anthropic-version,x-api-key,x-request-id,idempotency-key",
)


@pytest.mark.parametrize("headers", ASKED)
@pytest.mark.parametrize("origin", ["https://a.example", "*"])
def test_a_browsers_sdk_passes_the_preflight_with_only_origins_set(headers: str, origin: str) -> None:
    with running(api_keys=("k",), cors_allow_origins=(origin,)) as server, server.client() as client:
        asked = {
            "origin": "https://a.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": headers,
        }
        allowed = client.options("/v1/chat/completions", headers=asked)
        assert allowed.status_code == 200
        assert set(headers.split(",")) <= set(allowed.headers["access-control-allow-headers"].split(","))
        assert allowed.headers["access-control-allow-origin"] == origin
        answer = client.get("/v1/models", headers={"origin": "https://a.example"})
        assert answer.status_code == 401  # which the page may read as well
        assert answer.headers["access-control-allow-origin"] == origin
        exposed = answer.headers["access-control-expose-headers"]
        assert {"x-request-id", "retry-after", "x-octavo-ignored-fields"} <= set(exposed.split(", "))


def test_headers_may_be_named_one_by_one() -> None:
    settings = {"cors_allow_origins": ("*",), "cors_allow_headers": ("authorization", "content-type")}
    with running(**settings) as server, server.client() as client:
        for headers, status in (("authorization,content-type", 200), ("authorization,x-other", 400)):
            asked = {
                "origin": "https://a.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": headers,
            }
            assert client.options("/v1/completions", headers=asked).status_code == status


def test_no_cors_by_default(server: Running) -> None:
    answer = server.get("/v1/models", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("announced", [True, False])
def test_giant_body_is_refused_while_it_arrives(announced: bool) -> None:
    with running(max_body_bytes=100_000) as server:
        connection = connect(server)
        framing = b"content-length: 100000000" if announced else b"transfer-encoding: chunked"
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(head + framing + b"\r\n\r\n")
        if not announced:
            for _ in range(30):
                connection.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
        answer = b""
        while data := connection.recv(10_000):  # ends because the server closes, body or not
            answer += data
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"body_too_large"' in answer
        assert server.complete(max_tokens=1)


def test_request_ids_are_kept_if_plain_and_made_otherwise(server: Running) -> None:
    assert (
        server.get("/live", headers={"x-request-id": "abc-1:2.3_4"}).headers["x-request-id"] == "abc-1:2.3_4"
    )
    for odd in ("a b", "x" * 129, "é".encode(), ""):
        made = server.get("/nowhere", headers={"x-request-id": odd}).headers["x-request-id"]
        assert len(made) == 32


def test_full_queue_is_429_with_retry_after() -> None:
    with running(FakeEngine(step_s=0.02), capacity=3) as server:
        body = {"prompt": "x", "max_tokens": 50, "n": 2}
        first = threading.Thread(target=server.post, args=("/v1/completions", body))
        first.start()
        within(5, lambda: server.service.admission.in_flight == 2)
        refused = server.post("/v1/completions", body)
        assert refused.status_code == 429
        assert check_envelope(refused.json())["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.post("/v1/completions", {**body, "n": 1, "max_tokens": 1}).status_code == 200
        first.join()
        assert server.post("/v1/completions", body).status_code == 200


class HeldTokenizer(ByteTokenizer):
    """Encodes once it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def encode_prompt(self, text: str) -> list[int]:
        assert self.go.wait(20)
        return super().encode_prompt(text)


def test_text_jobs_wait_in_a_bounded_queue() -> None:
    settings = {"num_text_threads": 1, "max_waiting_text_jobs": 1}
    tokenizer = HeldTokenizer()
    with running(tokenizer=tokenizer, **settings) as server:
        answers: list[httpx.Response] = []
        clients = [
            threading.Thread(target=lambda: answers.append(server.post("/tokenize", {"prompt": "x"})))
            for _ in range(4)
        ]
        for client in clients:
            client.start()
        within(10, lambda: len(answers) == 2)  # one is held, one waits, two are refused
        tokenizer.go.set()
        for client in clients:
            client.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert check_envelope(refused.json())["code"] == "text_queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.post("/tokenize", {"prompt": "x"}).status_code == 200


def test_slow_chat_templates_hold_up_chats_alone() -> None:
    held = ByteTokenizer()

    class HeldTemplate(PlainTemplate):
        go = threading.Event()

        def encode(self, *args: Any, **options: Any) -> tuple[str, list[int]]:
            assert self.go.wait(20)
            return super().encode(*args, **options)

    template = HeldTemplate()
    messages = {"messages": [{"role": "user", "content": "x"}]}
    with running(tokenizer=held, num_text_threads=2) as server:
        server.service.template = template  # type: ignore[assignment]
        paths = ["/v1/chat/completions", "/tokenize"] * 4
        answers: list[httpx.Response] = []
        chats = [
            threading.Thread(target=lambda path=path: answers.append(server.post(path, messages)))
            for path in paths
        ]
        for chat in chats:
            chat.start()
        within(10, lambda: server.service.rendering._jobs == len(paths))
        assert server.complete(max_tokens=3)["choices"][0]["text"] == "abc"
        assert server.post("/tokenize", {"prompt": "x"}).json()["count"] == 1
        large = {"prompt": "x", "max_tokens": 1, "user": "", "metadata": {"a": "b" * 100_000}}
        assert server.post("/v1/completions", large).status_code == 200
        template.go.set()
        for chat in chats:
            chat.join()
        assert [answer.status_code for answer in answers] == [200] * len(paths)


def test_not_ready_until_the_engine_is() -> None:
    with running(start_engine=False) as server:
        assert server.get("/live").status_code == 200
        health = server.get("/health")
        assert (health.status_code, check_envelope(health.json())["code"]) == (503, "loading")
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            answer = server.post(path, body)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 200


def test_what_comes_while_an_engine_begins_again_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a 503, in a pause that streams survive. Where the pause grows long it is one."""
    with running() as server:
        server.call(server.service.note_ready)
        server.call(lambda: lose_engine(server))
        assert server.get("/health").status_code == 503
        assert server.complete(max_tokens=3)["choices"][0]["text"] == "abc"
        monkeypatch.setattr("server.service.RESTART_WAIT_S", 0.0)
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 503


def lose_engine(server: Running) -> None:
    server.engine.ready = None
    server.service.note_ready()


def test_a_stuck_engine_is_alive_but_not_ready() -> None:
    with running(FakeEngine(stuck=True), engine_stall_timeout_s=0.1) as server:
        assert server.get("/health").status_code == 200
        body = {"prompt": "x", "timeout_s": 1}
        waiting = threading.Thread(target=server.post, args=("/v1/completions", body))
        waiting.start()
        within(1, lambda: server.get("/health").status_code == 503)
        assert server.get("/live").status_code == 200
        waiting.join()
        assert server.get("/health").status_code == 200


def test_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    with running(FakeEngine(step_s=0.01), drain_timeout_s=10) as server:
        answers = []
        runs = threading.Thread(target=lambda: answers.append(server.complete(max_tokens=40)))
        runs.start()
        within(5, lambda: bool(server.engine.live))
        import asyncio

        drained = asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop)
        within(1, lambda: server.get("/health").status_code == 503)
        refused = server.post("/v1/completions", {"prompt": "x"})
        assert (refused.status_code, check_envelope(refused.json())["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        drained.result(5)
        runs.join(5)
        assert len(answers[0]["choices"][0]["text"]) == 40


def test_drain_ends_what_does_not_finish_in_time() -> None:
    import asyncio

    with running(FakeEngine(step_s=0.05), drain_timeout_s=0.2) as server:
        texts: list[str] = []
        body = {"prompt": "x", "max_tokens": 200, "stream": True}
        runs = threading.Thread(target=lambda: texts.append(server.post("/v1/completions", body).text))
        runs.start()
        within(5, lambda: bool(server.engine.live))
        began = time.monotonic()
        asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop).result(5)
        runs.join(5)
        assert time.monotonic() - began < 2
        assert '"code":"draining"' in texts[0]
        assert texts[0].endswith("data: [DONE]\n\n")
        assert server.service.admission.in_flight == 0
