"""What HTTP/1 allows and what it forbids, byte by byte: nothing of a body is ever taken for a request."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import time
import zlib

import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import Running, running
from tests.server.http.sockets import (
    LAST_LIVE,
    LIVE,
    answers_in,
    connect,
    head,
    post,
    read_all,
    send,
    text_of,
)

PATH = "/v1/completions"
BODY = {"prompt": "x", "max_tokens": 3}
CLOSE = "Connection: close"
SMUGGLED = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"

# Upgrades

OFFERS = [
    (
        "Connection: Upgrade, HTTP2-Settings, close",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    ),
    ("Connection: close, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    ("Connection: upgrade, close", "upgrade: TLS/1.2, something/else"),
    ("Connection: close", "Upgrade: h2c"),
]


def cuts(request: bytes) -> dict[str, list[bytes]]:
    whole, _, body = request.partition(b"\r\n\r\n")
    return {
        "one segment": [request],
        "the body in its own": [whole + b"\r\n\r\n", body],
        "byte by byte": [request[at : at + 1] for at in range(len(request))],
        "the head's end with the body": [whole, b"\r\n\r\n" + body],
    }


@pytest.mark.parametrize("cut", list(cuts(b"")))
@pytest.mark.parametrize("offer", OFFERS, ids=lambda offer: offer[1])
def test_an_upgrade_that_is_not_taken_is_ignored(server: Running, offer: tuple[str, ...], cut: str) -> None:
    gap_s = 0.0005 if cut == "byte by byte" else 0.05
    [answer] = send(server, *cuts(post(PATH, BODY, *offer))[cut], gap_s=gap_s)
    assert (answer.status, answer.text) == (200, "abc")


@pytest.mark.parametrize("gap_s", [0.0, 0.05])
def test_the_body_of_an_upgrade_is_no_request(server: Running, gap_s: float) -> None:
    """Whoever gets a server to read a body as requests reaches past the proxy before it."""
    begin = head(PATH, f"Content-Length: {len(SMUGGLED)}", *OFFERS[0])
    [answer] = send(server, begin, SMUGGLED, gap_s=gap_s)
    assert (answer.status, answer.code) == (400, "invalid_json")


def test_an_upgrade_may_be_chunked_and_others_may_follow(server: Running) -> None:
    raw = json.dumps(BODY).encode()
    chunked = head(PATH, "Connection: Upgrade", "Upgrade: h2c", "Transfer-Encoding: chunked")
    chunked += b"".join(b"1\r\n%c\r\n" % byte for byte in raw) + b"0\r\n\r\n"
    answers = send(server, chunked + post(PATH, BODY, "Connection: Upgrade", "Upgrade: h2c") + LAST_LIVE)
    assert [answer.status for answer in answers] == [200] * 3
    assert [answer.text for answer in answers[:2]] == ["abc", "abc"]


def test_upgrade_headers_stay_out_of_nothing_else(server: Running) -> None:
    """The head is read twice; it counts once."""
    with running(max_header_bytes=2048) as small:
        long = "X-Long: " + "y" * 1500
        assert send(small, post(PATH, BODY, long, *OFFERS[0]))[0].status == 200
        assert send(small, post(PATH, BODY, long + "y" * 600, *OFFERS[0]))[0].status == 431


def test_connect_is_refused(server: Running) -> None:
    [answer] = send(server, b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED)
    assert (answer.status, answer.code) == (405, "method_not_allowed")


def test_http2_without_asking_is_refused(server: Running) -> None:
    [answer] = send(server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
    assert (answer.status, answer.code) == (505, "http_version_not_supported")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_that_offers_http2_is_served(server: Running) -> None:
    command = ["curl", "-s", "--http2", "-m", "10", "-H", "content-type: application/json"]
    command += ["-d", json.dumps(BODY), server.url + PATH]
    done = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"] == "abc"


# What could be read in two ways

LENGTH = b"Content-Length: 5\r\n"
AMBIGUOUS = {
    "both": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    "both, the other way round": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n",
    "two equal lengths": LENGTH * 2,
    "a list of lengths": b"Content-Length: 5, 5\r\n",
    "negative": b"Content-Length: -5\r\n",
    "signed": b"Content-Length: +5\r\n",
    "huge": b"Content-Length: 99999999999999999999999\r\n",
    "no number": b"Content-Length: five\r\n",
    "hexadecimal": b"Content-Length: 0x5\r\n",
    "a space before the colon": b"Content-Length : 5\r\n",
    "folded": b"Content-Length:\r\n 5\r\n",
    "a folded other": b"X: a\r\n b\r\n" + LENGTH,
    "bare line feed": b"X: a\n" + LENGTH,
    "bare carriage return": b"X: a\rY: b\r\n" + LENGTH,
    "zero byte": b"X: a\0b\r\n" + LENGTH,
    "xchunked": b"Transfer-Encoding: xchunked\r\n",
    "identity": b"Transfer-Encoding: identity\r\n",
    "chunked, then gzip": b"Transfer-Encoding: chunked, gzip\r\n",
    "gzip, then chunked": b"Transfer-Encoding: gzip, chunked\r\n",
    "gzip and chunked in lines of their own": b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    "chunked with a parameter": b"Transfer-Encoding: chunked;x=1\r\n",
}


@pytest.mark.parametrize("lines", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_ambiguous_framing_is_refused_and_ends_the_connection(server: Running, lines: bytes) -> None:
    begin = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n"
    answers = send(server, begin + b"0\r\n\r\n" + SMUGGLED)
    assert len(answers) == 1
    assert answers[0].status in (400, 501)
    assert answers[0].headers["connection"] == "close"
    assert answers[0].code in ("invalid_http", "unsupported_transfer_encoding")


@pytest.mark.parametrize("last", [(), (CLOSE,)], ids=["kept", "closed"])
@pytest.mark.parametrize(
    "chunks",
    [
        b"0x5\r\nhello\r\n",
        b"-5\r\nhello\r\n",
        b"5\nhello\n",
        b"fffffffffffffffff\r\n",
        b"5\r\nhelloX",
        b"\r\n",
    ],
)
def test_a_bad_chunk_is_refused_by_the_request_it_belongs_to(
    server: Running, chunks: bytes, last: tuple[str, ...]
) -> None:
    """Also where nothing may follow it, which once left the client without an answer for ever."""
    answers = send(server, head(PATH, "Transfer-Encoding: chunked", *last) + chunks + SMUGGLED)
    assert [(answer.status, answer.code) for answer in answers] == [(400, "invalid_http")]
    paths = [name for name in server.metrics() if 'handler="/nowhere"' in name]
    assert not paths


@pytest.mark.parametrize("apart", [False, True])
def test_trailers_are_no_headers(apart: bool) -> None:
    """A key in a trailer once opened the server: no proxy before it looks there."""
    with running(api_keys=("key",)) as server:
        begin = head("/v1/models", "Transfer-Encoding: chunked", CLOSE, method="GET") + b"0\r\n"
        trailers = b"Authorization: Bearer key\r\nX-Request-Id: mine\r\n\r\n"
        [answer] = send(server, *([begin, trailers] if apart else [begin + trailers]))
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert answer.headers["x-request-id"] != "mine"


@pytest.mark.parametrize("version", ["0.9", "1.2", "2.0", "3.0"])
def test_other_versions_are_refused(server: Running, version: str) -> None:
    [answer] = send(server, head("/live", "Connection: close", method="GET", version=version))
    assert (answer.status, answer.code) == (505, "http_version_not_supported")


def test_a_length_beyond_all_is_413(server: Running) -> None:
    [answer] = send(server, head(PATH, "Content-Length: 18446744073709551615") + b"x")
    assert (answer.status, answer.code) == (413, "body_too_large")


def test_chunks_of_http_1_0_are_refused(server: Running) -> None:
    [answer] = send(server, head(PATH, "Transfer-Encoding: chunked", version="1.0") + b"0\r\n\r\n" + SMUGGLED)
    assert (answer.status, answer.code) == (400, "invalid_http")


# Pipelines, 100-continue, closing


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    requests = [post(PATH, {"prompt": "x", "max_tokens": count, "stream": count == 2}) for count in (3, 2, 1)]
    for pieces in ([b"".join([*requests, LAST_LIVE])], [*requests, LAST_LIVE]):
        answers = send(server, *pieces)
        assert [answer.status for answer in answers] == [200] * 4
        assert [answers[0].text, answers[2].text] == ["abc", "a"]
        assert answers[1].body.endswith(b"data: [DONE]\n\n")


def test_what_is_wrong_after_a_good_request_is_answered_after_it(server: Running) -> None:
    answers = send(server, post(PATH, BODY) + b"nonsense\r\n\r\n")
    assert [answer.status for answer in answers] == [200, 400]
    assert answers[0].text == "abc"


def test_a_pipeline_is_bounded(server: Running) -> None:
    answers = send(server, LIVE * 500)
    assert 1 <= len(answers) <= 32
    assert answers[-1].headers["connection"] == "close"


def test_what_follows_a_last_request_is_dropped(server: Running) -> None:
    assert [answer.status for answer in send(server, LAST_LIVE + SMUGGLED)] == [200]


def test_100_continue_comes_before_the_body_is_sent(server: Running) -> None:
    raw = json.dumps(BODY).encode()
    with connect(server) as client:
        client.sendall(head(PATH, f"Content-Length: {len(raw)}", "Expect: 100-continue", CLOSE))
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(raw)
        [answer] = answers_in(read_all(client))
    assert answer.text == "abc"


@pytest.mark.parametrize(
    ("path", "length", "status"), [(PATH, 2**30, 413), ("/nowhere", 100, 404), (PATH, 2**63, 413)]
)
def test_a_refusal_spares_the_client_its_body(server: Running, path: str, length: int, status: int) -> None:
    with connect(server) as client:
        client.sendall(head(path, f"Content-Length: {length}", "Expect: 100-continue"))
        received = read_all(client)
    assert received.startswith(b"HTTP/1.1 %d" % status)
    assert b"connection: close" in received


def test_empty_lines_before_a_request_are_skipped(server: Running) -> None:
    answers = send(server, b"\r\n\r\n" + post(PATH, BODY) + b"\r\n", LAST_LIVE, gap_s=0.05)
    assert [answer.status for answer in answers] == [200, 200]


def test_a_connection_serves_many_requests(server: Running) -> None:
    with connect(server) as client:
        for _ in range(20):
            client.sendall(LIVE)
            assert b"alive" in client.recv(65536)


# HTTP/1.0


@pytest.mark.parametrize("keep", [(), ("Connection: keep-alive",)])
def test_a_stream_to_http_1_0_is_not_chunked_and_ends_with_the_connection(
    server: Running, keep: tuple[str, ...]
) -> None:
    [answer] = send(server, post(PATH, {**BODY, "stream": True}, *keep, version="1.0"))
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    events = answer.body.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert all(line.startswith(b"data: {") for line in events[:-2])


def test_an_answer_with_a_length_to_http_1_0_keeps_the_connection_if_asked_to(server: Running) -> None:
    kept = post(PATH, BODY, "Connection: keep-alive", version="1.0")
    answers = send(server, kept, kept, post(PATH, BODY, version="1.0"), gap_s=0.05)
    assert [answer.text for answer in answers] == ["abc"] * 3
    assert [answer.headers["connection"] for answer in answers] == ["keep-alive", "keep-alive", "close"]


# Clients that shut their sending side


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_half_closer_gets_its_whole_answer(stream: bool, version: str) -> None:
    """As `printf … | nc -N`."""
    with running(FakeEngine(step_s=0.05)) as server:
        request = post(PATH, {"prompt": "x", "max_tokens": 20, "stream": stream}, version=version)
        [answer] = send(server, request, shut=True)
        assert answer.status == 200
        if stream:
            assert len(text_of(answer.body)) == 20
            assert answer.body.endswith(b"data: [DONE]\n\n")
        else:
            assert len(answer.text) == 20
        assert not server.engine.aborts


def test_a_half_closer_may_have_sent_several(server: Running) -> None:
    answers = send(server, post(PATH, BODY) * 3, shut=True)
    assert [answer.text for answer in answers] == ["abc"] * 3


def test_a_half_closer_that_leaves_is_noticed() -> None:
    with running(FakeEngine(stuck=True)) as server, connect(server) as client:
        client.sendall(post(PATH, BODY))
        client.shutdown(socket.SHUT_WR)
        time.sleep(0.3)
        assert server.engine.live
        client.close()
        deadline = time.monotonic() + 5
        while server.engine.live:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# Content codings

RAW = json.dumps(BODY).encode()
BARE = zlib.compressobj(wbits=-15)
CODED = {
    "gzip": gzip.compress(RAW),
    "GZIP": gzip.compress(RAW[:5]) + gzip.compress(RAW[5:]),
    "x-gzip": gzip.compress(RAW),
    "deflate": zlib.compress(RAW),
    "Deflate": BARE.compress(RAW) + BARE.flush(),
    "identity": RAW,
    "": RAW,
}


@pytest.mark.parametrize("coding", CODED)
def test_coded_bodies_are_decoded(server: Running, coding: str) -> None:
    headers = {"content-encoding": coding, "content-type": "application/json"}
    with server.client() as client:
        answer = client.post(PATH, content=CODED[coding], headers=headers)
        assert answer.json()["choices"][0]["text"] == "abc"
        text = gzip.compress(json.dumps({"prompt": "hi"}).encode())
        headers["content-encoding"] = "gzip"
        assert client.post("/tokenize", content=text, headers=headers).json()["count"] == 2


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress", "aws-chunked"])
def test_other_codings_are_415_and_named(server: Running, coding: str) -> None:
    headers = {"content-encoding": coding, "content-type": "application/json"}
    with server.client() as client:
        for path in (PATH, "/v1/chat/completions", "/tokenize", "/detokenize"):
            answer = client.post(path, content=RAW, headers=headers)
            assert answer.status_code == 415
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("unsupported_content_encoding", "content-encoding")
            assert coding in error["message"]


@pytest.mark.parametrize(
    "content",
    [RAW, CODED["gzip"][:-4], CODED["gzip"] + b"x", gzip.compress(b"") * 100, CODED["gzip"][:3]],
    ids=["plain", "cut", "followed", "empty", "a beginning"],
)
def test_a_damaged_coding_is_400(server: Running, content: bytes) -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    with server.client() as client:
        answer = client.post(PATH, content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "content-encoding"


@pytest.mark.parametrize("members", [1, 8])
def test_a_bomb_is_413_before_it_unfolds(members: int) -> None:
    bomb = gzip.compress(bytes(2**26 // members)) * members
    assert len(bomb) < 2**17
    with running(max_body_bytes=2**20) as server, server.client() as client:
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        answer = client.post(PATH, content=bomb, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
