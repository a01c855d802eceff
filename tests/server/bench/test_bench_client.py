"""The measuring client: bytes cut anywhere, honest figures, failures that are counted."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.client import Client, Outcome, Reading
from server.bench.events import EventSplitter
from server.bench.http import ChunkedDecoder, HttpError, Target
from server.bench.workloads import Job
from tests.server.bench.fake_server import FakeServer, fake_server

JOB = Job(input_tokens=3, output_tokens=5)


def client_of(fake: FakeServer, *, api: str = "completions", keep_alive: bool = True) -> Client:
    target = Target.of(fake.url, "secret")
    return Client(target, model="fake", api=api, keep_alive=keep_alive, timeout_s=10)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.binary(min_size=1, max_size=40)), st.lists(st.integers(0, 10_000), max_size=12))
def test_chunked_bodies_decode_however_they_are_cut(chunks: list[bytes], places: list[int]) -> None:
    encoded = b"".join(b"%X;ext=1\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    decoder = ChunkedDecoder()
    encoded += b"0\r\nTrailer: x\r\n\r\n"
    assert b"".join(decoder.feed(piece) for piece in cut(encoded, places)) == b"".join(chunks)
    assert decoder.done


@pytest.mark.parametrize("data", [b"xyz\r\n", b"2\r\nabc\r\n", b"1" * 70_000])
def test_malformed_chunks_are_errors(data: bytes) -> None:
    with pytest.raises(HttpError):
        ChunkedDecoder().feed(data)


@given(st.lists(st.integers(0, 10_000), max_size=12))
def test_events_come_out_whole_however_they_are_cut(places: list[int]) -> None:
    stream = b': ping\n\ndata: {"a": 1}\n\nevent: x\r\ndata:{"b": 2}\r\n\r\ndata: [DONE]\n\n'
    splitter = EventSplitter()
    found = [data for piece in cut(stream, places) for data in splitter.feed(piece)]
    assert found == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:81/v1", ("h", 81, False, "")),
        ("https://h/proxy/v1/", ("h", 443, True, "/proxy")),
        ("127.0.0.1:8000", ("127.0.0.1", 8000, False, "")),
    ],
)
def test_urls(url: str, expected: tuple[str, int, bool, str]) -> None:
    target = Target.of(url)
    assert (target.host, target.port, target.secure, target.base) == expected


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no http URL"):
        Target.of("ftp://h")


@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_a_stream_is_measured_token_by_token(api: str) -> None:
    async with fake_server(gap_s=0.02) as fake:
        client = client_of(fake, api=api)
        outcome = await client.measure(JOB, "x y z")
        client.close()
    assert outcome.error == ""
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (3, 5, 2)
    assert len(outcome.gaps_s) == 4  # the role chunk and the finish chunk are no tokens
    assert all(gap >= 0.015 for gap in outcome.gaps_s)
    assert outcome.ttft_s is not None
    assert outcome.ttft_s < outcome.completion_s
    assert outcome.completion_s >= 0.1
    sent = fake.bodies[0]
    assert sent["temperature"] == 0
    assert sent["ignore_eos"] is True
    assert sent["stream_options"] == {"include_usage": True}
    assert fake.headers[0]["authorization"] == "Bearer secret"


async def test_without_usage_chunks_are_counted() -> None:
    async with fake_server(usage=False) as fake:
        assert (await client_of(fake).measure(JOB, "x")).output_tokens == 5


@pytest.mark.parametrize(("keep_alive", "connections"), [(True, 1), (False, 3)])
async def test_connections_are_kept_unless_told_otherwise(keep_alive: bool, connections: int) -> None:
    async with fake_server() as fake:
        client = client_of(fake, keep_alive=keep_alive)
        for _ in range(3):
            assert (await client.measure(JOB, "x")).error == ""
        client.close()
    assert fake.num_connections == connections
    assert fake.headers[0]["connection"] == ("keep-alive" if keep_alive else "close")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refuse": True}, "status 429"),
        ({"break_after": 2}, "closed the connection in the middle"),
        ({"error_after": 2}, "engine died"),
        ({"done": False}, "ended without a finish reason"),
    ],
)
async def test_failures_are_told_and_do_not_raise(options: dict[str, object], message: str) -> None:
    async with fake_server(**options) as fake:
        outcome = await client_of(fake).measure(JOB, "x")
    assert message in outcome.error


async def test_a_server_that_is_not_there_is_a_failed_request() -> None:
    client = Client(Target.of("http://127.0.0.1:1"), model="m", api="chat", keep_alive=True, timeout_s=5)
    assert (await client.measure(JOB, "x")).error


async def test_a_silent_server_times_out() -> None:
    async with fake_server(gap_s=5) as fake:
        client = Client(Target.of(fake.url), model="m", api="completions", keep_alive=True, timeout_s=0.2)
        assert (await client.measure(JOB, "x")).error == "TimeoutError"


def test_a_chunk_costs_the_client_far_less_than_a_millisecond() -> None:
    """The CPU time that the client takes from the server beside it, of its own part of the work."""
    event = json.dumps({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"})[:-1]
    event += ', "choices": [{"index": 0, "text": " word", "logprobs": null, "finish_reason": null}]}'
    payload = f"data: {event}\n\n".encode()
    piece = b"%x\r\n%s\r\n" % (len(payload), payload)
    decoder, splitter, reading = ChunkedDecoder(), EventSplitter(), Reading(Outcome(JOB, 0.0))
    start_s = time.process_time()
    for _ in range(2000):
        for data in splitter.feed(decoder.feed(piece)):
            reading.take(data, 1.0)
    assert (time.process_time() - start_s) / 2000 < 0.0002
