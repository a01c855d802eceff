"""Bounds on connections and heads, tried with raw sockets: the answer is always the envelope."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack, suppress

import pytest

from tests.server.http.conftest import Running, running

OK = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer_to(server: Running, *pieces: bytes, gap_s: float = 0.0) -> tuple[int, dict[str, str]]:
    """Send the pieces -> the status and the error of the envelope, read until the server closes."""
    with connect(server) as client:
        for piece in pieces:
            with suppress(ConnectionError):  # it may have closed already
                client.sendall(piece)
            time.sleep(gap_s)
        received = b""
        while piece := client.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return int(head.split()[1]), json.loads(body)["error"]


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


def test_a_body_does_not_count_as_a_head() -> None:
    with running(max_header_bytes=2048) as server:
        assert server.post("/tokenize", {"prompt": "x" * 100_000}).status_code == 200


def test_what_is_no_http_is_400_in_the_envelope(server: Running) -> None:
    status, error = answer_to(server, b"\x16\x03\x01 hello\r\n\r\n")
    assert (status, error["code"], error["type"]) == (400, "invalid_http", "invalid_request_error")


def test_connections_over_the_limit_are_503_and_room_comes_back() -> None:
    with running(max_connections=2) as server:
        with ExitStack() as held:
            for client in [held.enter_context(connect(server)) for _ in range(2)]:
                client.sendall(OK)
                assert client.recv(65536).startswith(b"HTTP/1.1 200")
            status, error = answer_to(server, OK)
            assert (status, error["code"]) == (503, "too_many_connections")
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with connect(server) as client:
                client.sendall(OK)
                if client.recv(65536).startswith(b"HTTP/1.1 200"):
                    return
            time.sleep(0.05)
        raise AssertionError("closed connections still count")
