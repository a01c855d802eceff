"""One budget for what is held of requests and answers: what does not fit is refused, sleepers pay for it."""

from __future__ import annotations

import gc
import json
import socket
import struct
import threading
import time
import tracemalloc
from contextlib import ExitStack

import msgspec
import pytest

from engine.messages import SequenceOutput
from scheduler.types import Request, SamplingParams
from server.buffers import Buffers
from server.streams import Slot, token_bytes
from tests.server.byte_tokenizer import ByteTokenizer
from tests.server.fake_engine import FakeEngine, scored
from tests.server.http.conftest import Running, running
from tests.server.http.sockets import LAST_LIVE, answers_in, connect, head, post, read_all, send
from tests.server.http.test_connections import narrow
from tests.server.http.test_disconnect import within

PATH = "/v1/completions"
CLOSE = "Connection: close"
KIB = 2**10


def held(server: Running) -> tuple[int, int]:
    buffers = server.service.buffers
    return buffers.incoming.num_bytes, buffers.outgoing.num_bytes


def half_sent(server: Running, num_bytes: int, framing: str) -> socket.socket:
    client = connect(server)
    body = b"x" * num_bytes
    client.sendall(
        head(PATH, framing) + (body if "Length" in framing else b"%x\r\n%b\r\n" % (num_bytes, body))
    )
    return client


# What arrives


def test_bodies_that_do_not_end_are_counted_and_bounded() -> None:
    """20 unfinished bodies of 15 MiB cost 316 MiB once."""
    with running(max_buffered_bytes=512 * KIB, max_body_bytes=128 * KIB) as server, ExitStack() as stack:
        for framing in ("Content-Length: 120000", "Transfer-Encoding: chunked") * 10:
            stack.enter_context(half_sent(server, 30_000, framing))
            time.sleep(0.02)
            assert held(server)[0] <= 256 * KIB
        assert held(server)[0] > 100 * KIB
    assert held(server) == (0, 0)


def test_a_body_that_does_not_fit_is_refused_before_it_is_read() -> None:
    with running(max_buffered_bytes=512 * KIB, max_body_bytes=200 * KIB) as server, ExitStack() as stack:
        stack.enter_context(half_sent(server, 150 * KIB, f"Content-Length: {160 * KIB}"))
        within(5, lambda: held(server)[0] >= 150 * KIB)
        name = 'octavo:buffered_bytes{direction="in",model_name="org/fake"}'
        assert server.metrics()[name] >= 150 * KIB
        [answer] = send(server, head(PATH, f"Content-Length: {120 * KIB}"))
        assert (answer.status, answer.code) == (503, "buffers_full")
        assert int(answer.headers["retry-after"]) >= 1
        [answer] = send(server, post(PATH, {"prompt": "x", "max_tokens": 1}, CLOSE))
        assert answer.status == 200
    assert held(server) == (0, 0)


def test_a_chunked_body_that_does_not_fit_is_refused_as_it_grows() -> None:
    with running(max_buffered_bytes=512 * KIB, max_body_bytes=200 * KIB) as server, ExitStack() as stack:
        stack.enter_context(half_sent(server, 150 * KIB, f"Content-Length: {160 * KIB}"))
        within(5, lambda: held(server)[0] >= 150 * KIB)
        chunks = [b"4000\r\n" + b"x" * 0x4000 + b"\r\n"] * 10
        [answer] = send(server, head(PATH, "Transfer-Encoding: chunked"), *chunks, gap_s=0.02)
        assert (answer.status, answer.code) == (503, "buffers_full")


def test_who_is_alone_may_send_the_largest_body() -> None:
    with running(max_buffered_bytes=64 * KIB, max_body_bytes=100 * KIB) as server:
        body = {"prompt": "x", "max_tokens": 1, "user": "", "metadata": {"x": "y" * 90_000}}
        assert server.post(PATH, body).status_code in (200, 400)
    assert held(server) == (0, 0)


def test_heads_count_as_well() -> None:
    settings = {"max_buffered_bytes": 128 * KIB, "max_header_bytes": 32 * KIB}
    with running(**settings) as server, ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(connect(server))
            client.sendall(b"GET /live HTTP/1.1\r\nX: " + b"y" * 20_000)
        within(5, lambda: held(server)[0] > 40 * KIB)
        time.sleep(0.1)
        assert held(server)[0] <= 64 * KIB
    assert held(server) == (0, 0)


def test_a_body_counts_until_its_request_is_accepted_and_no_longer() -> None:
    with running(FakeEngine(step_s=0.05, max_model_len=50_000)) as server, connect(server) as client:
        client.sendall(post(PATH, {"prompt": "x" * 20_000, "max_tokens": 100}, CLOSE))
        within(5, lambda: bool(server.engine.live))
        within(1, lambda: held(server)[0] == 0)
        assert answers_in(read_all(client))[0].status == 200


def test_a_pipeline_counts_for_what_is_not_answered_yet() -> None:
    """As long as the next head had begun nothing was given back: one connection could use up all."""
    big = head("/live", "X: " + "y" * 20_000, method="GET")
    with running(max_buffered_bytes=512 * KIB) as server, connect(server) as client:
        client.sendall(big[:100])
        for _ in range(20):
            client.sendall(big[100:] + big[:100])
            assert b"alive" in client.recv(65536)
            assert held(server)[0] < 3 * len(big)
    within(5, lambda: held(server) == (0, 0))


def test_a_pipeline_that_never_pauses_counts_for_what_is_not_accepted_yet() -> None:
    request = post(PATH, {"prompt": "x" * 10_000, "max_tokens": 20})
    with running(FakeEngine(step_s=0.01, max_model_len=50_000)) as server, connect(server) as client:
        client.sendall(request)
        for _ in range(10):
            client.sendall(request)
            received = b""
            while b'"usage"' not in received:
                received += client.recv(65536)
            assert held(server)[0] <= 3 * len(request)
    within(5, lambda: held(server) == (0, 0))


def test_who_finds_no_room_for_its_first_bytes_reads_why() -> None:
    with running(max_buffered_bytes=512 * KIB, max_body_bytes=250 * KIB) as server, ExitStack() as stack:
        stack.enter_context(half_sent(server, 240 * KIB, f"Content-Length: {250 * KIB}"))
        within(5, lambda: held(server)[0] >= 240 * KIB)
        client = stack.enter_context(connect(server))
        for piece in (post(PATH, {"prompt": "x" * 200 * KIB}), b"more", b"more"):
            client.sendall(piece)  # raises once the connection is reset, which takes the answer with it
            time.sleep(0.05)
        [answer] = answers_in(read_all(client))
        assert (answer.status, answer.code) == (503, "buffers_full")


# What leaves

LONG = {"prompt": "x", "max_tokens": 20_000, "logprobs": 5}


def fast(**settings: object) -> FakeEngine:
    return FakeEngine(max_model_len=50_000, tokens_per_step=20, step_s=0.001)


def test_output_of_unread_streams_is_bounded_and_a_reader_beside_them_gets_all() -> None:
    """4 streams that nobody read, 300k tokens in all, cost 600 MiB once."""
    with running(fast(), max_buffered_bytes=4 * 2**20) as server, ExitStack() as stack:
        for _ in range(4):
            sleeper = stack.enter_context(narrow(server))
            sleeper.sendall(post(PATH, {**LONG, "stream": True}))
        within(10, lambda: len(server.engine.live) == 4)
        largest = 0
        with connect(server) as client:
            client.sendall(post(PATH, {"prompt": "x", "max_tokens": 5000, "stream": True}, CLOSE))
            received = b""
            while piece := client.recv(65536):
                received += piece
                largest = max(largest, held(server)[1])
        [answer] = answers_in(received)
        events = [json.loads(line[6:]) for line in answer.body.split(b"\n\n") if line.startswith(b"data: {")]
        assert sum(len(event["choices"][0]["text"]) for event in events) == 5000
        assert answer.body.endswith(b"data: [DONE]\n\n")
        within(20, lambda: not server.engine.live)
        assert 2**20 < largest <= 2 * 2**20 + 100 * KIB
        name = f'http_requests_total{{handler="{PATH}",method="POST",status="499"}}'
        within(5, lambda: server.metrics().get(name, 0) >= 1)
    assert held(server) == (0, 0)


def test_an_answer_larger_than_the_budget_ends_with_an_error() -> None:
    with running(fast(), max_buffered_bytes=2 * 2**20) as server:
        answer = server.post(PATH, LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "buffers_full")
        assert not server.engine.live
        assert server.service.admission.in_flight == 0
        assert len(server.complete(max_tokens=200)["choices"][0]["text"]) == 200
    assert held(server) == (0, 0)


def test_a_large_answer_counts_while_it_is_read_slowly_and_not_below_nothing() -> None:
    engine = FakeEngine(max_model_len=50_000, tokens_per_step=500)
    with running(engine) as server, narrow(server) as client:
        client.sendall(post(PATH, {"prompt": "x", "max_tokens": 10_000, "logprobs": 2}, CLOSE))
        received, seen = client.recv(4096), set()
        while piece := client.recv(30_000):
            received += piece
            seen.add(held(server)[1])
        assert len(answers_in(received)[0].text) == 10_000
        assert max(seen) > 100 * KIB
        assert min(seen) >= 0
        within(5, lambda: held(server) == (0, 0))


def test_a_stream_that_slept_is_sent_in_pieces() -> None:
    """All that has arrived as one event would be hundreds of megabytes, and a loop that stands still."""
    engine = FakeEngine(max_model_len=50_000, tokens_per_step=5000)
    with running(engine) as server, narrow(server) as client:
        client.sendall(post(PATH, {**LONG, "stream": True}, CLOSE))
        within(10, lambda: bool(engine.requests) and not engine.live)
        [answer] = answers_in(read_all(client))
        events = [line for line in answer.body.split(b"\n\n") if line.startswith(b"data: {")]
        assert len(events) >= 20_000 // 256
        assert max(map(len, events)) < 2**18
        assert sum(len(json.loads(event[6:])["choices"][0]["text"]) for event in events) == 20_000


@pytest.mark.parametrize("alternatives", [None, 0, 5, 20])
def test_what_a_token_is_said_to_take_is_what_it_takes(alternatives: int | None) -> None:
    sampling = SamplingParams(max_tokens=1, logprobs=alternatives)
    request = Request(request_id="r", prompt_ids=(1,), sampling=sampling)
    logprobs = None if alternatives is None else (scored(300, -1.5, alternatives),)
    output = SequenceOutput("r", 0, (300,), logprobs=logprobs)
    decoder, raw = msgspec.msgpack.Decoder(SequenceOutput), msgspec.msgpack.encode(output)
    slot, count = Slot(), 2000
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(count):
            slot.merge(decoder.decode(raw))
        taken = tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()
    assert taken <= token_bytes(request) <= 3 * taken


def test_the_largest_holder_is_the_one_that_ends() -> None:
    outgoing, ended = Buffers(2000).outgoing, []
    small, large = (outgoing.open(lambda name=name: ended.append(name)) for name in ("small", "large"))
    small.add(300)
    large.add(600)
    assert not ended
    small.add(200)
    assert ended == ["large"]
    assert outgoing.num_bytes == 500
    large.add(5000)  # what it still gets counts no more: it is being freed
    assert outgoing.num_bytes == 500
    small.add(600)
    assert ended == ["large", "small"]
    assert outgoing.num_bytes == 0


# Clients that leave while they send


@pytest.mark.parametrize("how", ["closed", "reset", "shut"])
@pytest.mark.parametrize("framing", ["Content-Length: 120000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions", "/tokenize"])
def test_a_client_that_leaves_while_it_sends_is_499_without_a_traceback(
    how: str, framing: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running() as server, caplog.at_level("DEBUG", logger="octavo"):
        client = connect(server)
        client.sendall(head(path, framing) + b"400\r\n" + b"x" * 1000)
        within(5, lambda: held(server)[0] > 1000)
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "shut":
            client.shutdown(socket.SHUT_WR)
        else:
            client.close()
        name = f'http_requests_total{{handler="{path}",method="POST",status="499"}}'
        within(5, lambda: server.metrics().get(name) == 1)
        client.close()
        assert not any('status="500"' in name for name in server.metrics())
        within(5, lambda: held(server) == (0, 0))
    records = [record for record in caplog.records if record.name == "octavo"]
    assert not [record for record in records if record.exc_info or record.levelname == "ERROR"]
    lines = [record for record in records if getattr(record, "fields", {}).get("status") == 499]
    assert [record.levelname for record in lines] == ["INFO"]


def test_a_client_that_is_gone_when_its_refusal_ends_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """To shut a socket that is no longer connected raises, and was a 500 with a traceback."""
    with running() as server:
        for number in range(150):
            with connect(server) as client:
                client.sendall(head("/nowhere", "Content-Length: 100") + b"{")
                time.sleep(number % 10 * 0.0002)
                if number % 2:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert send(server, LAST_LIVE)[0].status == 200
        assert not any('status="500"' in name for name in server.metrics())
    assert not [record for record in caplog.records if record.exc_info]


class HeldTokenizer(ByteTokenizer):
    """Encodes once it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.busy = threading.Event(), threading.Event()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self.busy.set()
        assert self.go.wait(20)
        return super().encode(text, special=special)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)


@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, {"prompt": "x"}),
        (PATH, {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x"}),
    ],
)
def test_a_client_that_leaves_while_its_prompt_is_read_is_499(
    how: str, path: str, body: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = HeldTokenizer()
    with running(tokenizer=tokenizer) as server, caplog.at_level("INFO", logger="octavo"):
        client = connect(server)
        client.sendall(post(path, body))
        assert tokenizer.busy.wait(10)
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        within(5, lambda: held(server) == (0, 0))  # it is known to be gone
        tokenizer.go.set()
        name = f'http_requests_total{{handler="{path}",method="POST",status="499"}}'
        within(5, lambda: server.metrics().get(name) == 1)
        assert server.service.admission.in_flight == 0
        assert not server.engine.live
    assert not [record for record in caplog.records if record.exc_info]


def test_aborted_bodies_in_numbers_leave_nothing() -> None:
    with running() as server:
        for number in range(100):
            half_sent(server, 1000 * (number % 50), "Content-Length: 60000").close()
        assert send(server, LAST_LIVE)[0].status == 200
        within(10, lambda: held(server) == (0, 0))
        assert server.service.admission.in_flight == 0
