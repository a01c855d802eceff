"""Bounds on connections, heads and time, tried with raw sockets: the answer is always the envelope."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from server import connections
from server.buffers import Buffers
from server.config import ServerConfig
from server.metrics import Metrics
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import Running, running
from tests.server.http.sockets import (
    LAST_LIVE,
    LIVE,
    answers_in,
    connect,
    head,
    many_files,
    post,
    read_all,
    send,
)
from tests.server.http.test_disconnect import within

PATH = "/v1/completions"
BODY = {"prompt": "x", "max_tokens": 3}


def answer_to(server: Running, *pieces: bytes, gap_s: float = 0.0) -> tuple[int, dict[str, str]]:
    """Send the pieces -> the status and the error of the envelope, read until the server closes."""
    [answer] = send(server, *pieces, gap_s=gap_s)
    assert answer.headers["content-type"] == "application/json"
    return answer.status, json.loads(answer.body)["error"]


LONG_PATH = b"GET /" + b"x" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
LONG_HEADER = b"GET /live HTTP/1.1\r\nX: " + b"y" * 3000 + b"\r\n\r\n"
MANY_HEADERS = b"GET /live HTTP/1.1\r\n" + b"A: b\r\n" * 2000 + b"\r\n"
NEVER_ENDING = (b"GET /live HTTP/1.1\r\nX: ", *(b"y" * 1000 for _ in range(4)))
TRAILERS = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    b"T: u\r\n" * 2000,
)


@pytest.mark.parametrize(
    "pieces", [(LONG_PATH,), (LONG_HEADER,), (MANY_HEADERS,), NEVER_ENDING, TRAILERS],
    ids=["path", "header", "headers", "unfinished", "trailers"],
)  # fmt: skip
def test_a_head_over_the_limit_is_431(pieces: tuple[bytes, ...]) -> None:
    with running(max_header_bytes=2048) as server:
        status, error = answer_to(server, *pieces, gap_s=0.02)
        assert (status, error["code"]) == (431, "headers_too_large")
        assert "2048 bytes" in error["message"]
        assert server.get("/live").status_code == 200


def test_many_small_headers_count_for_the_memory_that_they_take() -> None:
    with running(max_header_bytes=8192) as server:
        few, many = (
            head("/live", *["A: b"] * count, "Connection: close", method="GET") for count in (100, 250)
        )
        assert len(many) < 2048
        assert [send(server, request)[0].status for request in (few, many)] == [200, 431]


def test_a_body_does_not_count_as_a_head() -> None:
    with running(max_header_bytes=2048) as server:
        assert server.post("/tokenize", {"prompt": "x" * 100_000}).status_code == 200


def test_what_is_no_http_is_400_in_the_envelope(server: Running) -> None:
    status, error = answer_to(server, b"\x16\x03\x01 hello\r\n\r\n")
    assert (status, error["code"], error["type"]) == (400, "invalid_http", "invalid_request_error")


# Places


def silent(server: Running, count: int, held: ExitStack) -> list[socket.socket]:
    return [held.enter_context(connect(server)) for _ in range(count)]


def status_of(server: Running, request: bytes) -> int:
    [answer] = send(server, request)
    return answer.status


@pytest.mark.parametrize("said", [b"", b"POST /v1/completions HTTP/1.1\r\nContent-Le"])
def test_probes_are_answered_whatever_else_is_connected(said: bytes) -> None:
    with running(max_connections=20) as server, ExitStack() as held:
        for client in silent(server, 20, held):
            client.sendall(said)
        for path in ("/live", "/health", "/metrics", "/live?x=1"):
            assert status_of(server, head(path, method="GET")) == 200, path
        status, error = answer_to(server, post(PATH, BODY))
        assert (status, error["code"]) == (503, "too_many_connections")
        status, error = answer_to(server, head("/v1/models", method="GET"))
        assert (status, error["code"]) == (503, "too_many_connections")


def test_silent_sockets_do_not_take_the_places_kept_for_probes() -> None:
    with many_files(1000), running(max_connections=2) as server, ExitStack() as held:
        silent(server, 3 * connections.PROBE_PLACES, held)
        within(5, lambda: len(server.service.metrics.render()) > 0)
        for _ in range(3):
            assert status_of(server, LIVE) == 200


def test_an_idle_connection_makes_room_and_the_longest_idle_first() -> None:
    with running(max_connections=3) as server, ExitStack() as held:
        first, second = silent(server, 2, held)
        for client in (first, second):
            client.sendall(LIVE)
            assert answers_in(client.recv(65536))[0].status == 200
        busy = held.enter_context(connect(server))
        busy.sendall(head(PATH, "Content-Length: 100"))
        assert status_of(server, post(PATH, BODY, "Connection: close")) == 200
        assert first.recv(100) == b""  # closed, and not reset
        second.sendall(LIVE)
        assert answers_in(second.recv(65536))[0].status == 200


def test_an_answer_that_is_still_being_read_is_not_cut_for_others() -> None:
    class Reader:
        """A connection, as far as its place goes."""

        def __init__(self, *, is_read: bool) -> None:
            self.is_read, self.ended = is_read, False
            self.loop = SimpleNamespace(call_later=lambda *_: None)

        def give_way(self) -> None:
            self.ended = True

    config = ServerConfig(max_connections=2)
    places: Any = connections.Connections(config, Buffers(2**20), Metrics("m"), None)
    slow, fast = Reader(is_read=False), Reader(is_read=True)
    for reader in (slow, fast):
        assert places.enter(reader)
        places.note_idle(reader, idle=True)
    assert places.enter(Reader(is_read=True))
    assert (slow.ended, fast.ended) == (False, True)
    assert not places.enter(Reader(is_read=True))
    assert not slow.ended


def test_connections_that_do_something_are_never_closed_for_others() -> None:
    with running(FakeEngine(step_s=0.02), max_connections=2) as server, ExitStack() as held:
        streams = silent(server, 2, held)
        for stream in streams:
            stream.sendall(post(PATH, {"prompt": "x", "max_tokens": 50, "stream": True}, "Connection: close"))
        within(5, lambda: len(server.engine.live) == 2)
        assert status_of(server, post(PATH, BODY)) == 503
        for stream in streams:
            assert answers_in(read_all(stream))[0].body.endswith(b"data: [DONE]\n\n")
        within(5, lambda: status_of(server, post(PATH, BODY, "Connection: close")) == 200)


def test_a_thousand_connections_are_served_beside_each_other() -> None:
    with many_files(2200), running(max_connections=1100) as server, ExitStack() as held:
        clients = silent(server, 1000, held)
        for client in clients:
            client.sendall(post(PATH, BODY))
        for client in clients:
            [answer] = answers_in(client.recv(65536))
            assert answer.text == "abc"
        for client in clients:
            client.sendall(LAST_LIVE)
        assert all(answers_in(read_all(client))[0].status == 200 for client in clients)
        assert server.service.buffers.incoming.num_bytes == 0
        assert server.service.buffers.outgoing.num_bytes == 0


# Time


def test_half_a_head_is_408_and_silence_is_closed() -> None:
    with running(head_timeout_s=0.3) as server:
        began = time.monotonic()
        for part in (b"G", b"GET /live HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5"):
            status, error = answer_to(server, part)
            assert (status, error["code"], error["type"]) == (408, "head_timeout", "timeout_error")
        assert send(server) == []
        assert send(server, b"\r\n") == []
        assert 1.2 < time.monotonic() - began < 10


def test_a_head_that_trickles_is_408() -> None:
    with running(head_timeout_s=0.3) as server:
        status, error = answer_to(server, *(LIVE[at : at + 1] for at in range(20)), gap_s=0.05)
        assert (status, error["code"]) == (408, "head_timeout")


def test_half_a_body_is_408() -> None:
    with running(body_timeout_s=0.3) as server:
        for framing in ("Content-Length: 100", "Transfer-Encoding: chunked"):
            status, error = answer_to(server, head(PATH, framing), b"5\r\nhe")
            assert (status, error["code"], error["type"]) == (408, "body_timeout", "timeout_error")
        name = f'http_requests_total{{handler="{PATH}",method="POST",status="408"}}'
        assert server.metrics()[name] == 2
        assert server.service.admission.in_flight == 0


def test_a_body_that_trickles_is_408_and_a_steady_one_is_not() -> None:
    long = post(PATH, {"prompt": "x" * 20_000, "max_tokens": 3}, "Connection: close")
    with running(FakeEngine(max_model_len=50_000), body_timeout_s=0.4) as server:
        status, error = answer_to(server, head(PATH, "Content-Length: 10"), *([b" "] * 8), gap_s=0.1)
        assert (status, error["code"]) == (408, "body_timeout")
        pieces = [long[at : at + 2000] for at in range(0, len(long), 2000)]  # well over a second in all
        [answer] = send(server, *pieces, gap_s=0.12)
        assert (answer.status, answer.text) == (200, "abc")


def test_a_request_under_way_has_no_time_limit_of_its_connection() -> None:
    tight = {"head_timeout_s": 0.2, "body_timeout_s": 0.2, "keep_alive_timeout_s": 0.2, "send_timeout_s": 0.2}
    with running(FakeEngine(step_s=0.25), **tight) as server:
        assert server.complete(max_tokens=5)["choices"][0]["text"] == "abcde"


def test_idle_connections_are_closed_after_their_time_and_not_before() -> None:
    with running(keep_alive_timeout_s=0.6, head_timeout_s=0.2) as server, connect(server) as client:
        for pause_s in (0.0, 0.3, 0.3):
            time.sleep(pause_s)
            client.sendall(LIVE)
            assert answers_in(client.recv(65536))[0].status == 200
        began = time.monotonic()
        assert client.recv(100) == b""
        assert 0.4 < time.monotonic() - began < 5


def test_the_second_head_has_its_time_too_and_the_first_answer_comes() -> None:
    with running(FakeEngine(step_s=0.1), head_timeout_s=0.3) as server:
        answers = send(server, post(PATH, {"prompt": "x", "max_tokens": 10}) + b"GET /li")
        assert [answer.status for answer in answers] == [200, 408]
        assert len(answers[0].text) == 10


# Readers


LONG = {"prompt": "x", "max_tokens": 20_000, "stream": True, "logprobs": 5}


def narrow(server: Running) -> socket.socket:
    """A client whose kernel takes little for it."""
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect((host, int(port)))
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_reads_is_cut_off_and_counted(stream: bool) -> None:
    engine = FakeEngine(max_model_len=50_000, tokens_per_step=50)
    with running(engine, send_timeout_s=0.4) as server, narrow(server) as client:
        client.sendall(post(PATH, {**LONG, "stream": stream}))
        within(20, lambda: bool(server.engine.requests))
        name = f'http_requests_total{{handler="{PATH}",method="POST",status="499"}}'
        within(20, lambda: server.metrics().get(name) == 1)
        assert not server.engine.live
        assert not server.service._active
        assert server.service.admission.in_flight == 0
        assert server.service.buffers.outgoing.num_bytes == 0
        assert b"[DONE]" not in read_all(client)


def test_a_slow_reader_loses_nothing() -> None:
    engine = FakeEngine(max_model_len=50_000, tokens_per_step=50)
    body = {**LONG, "max_tokens": 5000}
    with running(engine, send_timeout_s=0.8) as server, narrow(server) as client:
        client.sendall(post(PATH, body, "Connection: close"))
        received, began = b"", time.monotonic()
        while piece := client.recv(4096):
            received += piece
            time.sleep(0.03)
        assert time.monotonic() - began > 1.6
        [answer] = answers_in(received)
        events = [json.loads(line[6:]) for line in answer.body.split(b"\n\n") if line.startswith(b"data: {")]
        assert sum(len(event["choices"][0]["text"]) for event in events) == 5000
        assert answer.body.endswith(b"data: [DONE]\n\n")
