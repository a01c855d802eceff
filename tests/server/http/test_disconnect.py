"""A client that leaves frees its places and its pages, streaming or not; and a slow one costs little."""

from __future__ import annotations

import gc
import json
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from engine.messages import SequenceOutput
from scheduler.types import FinishReason
from server.metrics import Metrics
from server.routes.completions import CompletionView
from server.streams import Generation
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import Running, running

if TYPE_CHECKING:
    from collections.abc import Callable

BOUND_S = 1.0


def within(seconds: float, condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "not in time"
        time.sleep(0.005)
    return time.monotonic() - began


def raw_request(server: Running, path: str, body: dict[str, Any]) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("step_s", [0.01, 30.0])
def test_abort_follows_disconnect(stream: bool, path: str, step_s: float) -> None:
    with running(FakeEngine(step_s=step_s)) as server:
        prompts = {
            "/v1/completions": {"prompt": ["x", "y"]},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        }
        body = {**prompts[path], "n": 2, "max_tokens": 200, "stream": stream}
        connection = raw_request(server, path, body)
        within(5, lambda: bool(server.engine.live))
        if stream and step_s < 1:
            assert b"200 OK" in connection.recv(100)
        connection.close()
        within(BOUND_S, lambda: not server.engine.live)
        within(BOUND_S, lambda: server.service.admission.in_flight == 0)
        assert len(server.engine.aborts) == len(server.engine.requests)
        assert server.num_ended("abort") >= 2
        assert not server.service._active
        assert not server.service.metrics._live


def test_a_slow_reader_gets_everything_and_holds_up_nobody() -> None:
    def long_reply(request: Any, index: int) -> list[int]:
        return [120] * request.sampling.max_tokens

    with running(FakeEngine(reply=long_reply, max_model_len=50_000, tokens_per_step=50)) as server:
        body = {"prompt": "x", "max_tokens": 20_000, "stream": True, "logprobs": 5}
        connection = raw_request(server, "/v1/completions", body)
        within(10, lambda: not server.engine.live)
        assert server.complete(max_tokens=5)["choices"][0]["text"] == "xxxxx"
        received = bytearray()
        while b"[DONE]" not in received[-100:]:
            data = connection.recv(1 << 20)
            assert data
            received += data
        connection.close()
        chunks = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
        texts = [json.loads(chunk)["choices"][0]["text"] for chunk in chunks]
        assert sum(map(len, texts)) == 20_000


def test_silent_stream_is_kept_alive() -> None:
    with (
        running(FakeEngine(step_s=0.3), sse_keep_alive_s=0.05) as server,
        server.client() as client,
        client.stream(
            "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}
        ) as response,
    ):
        text = "".join(response.iter_text())
    assert text.startswith(": keep-alive\n\n")
    assert text.endswith("data: [DONE]\n\n")


def test_deadline_without_a_token_is_504_and_with_some_keeps_them() -> None:
    with running(FakeEngine(step_s=0.05)) as server:
        answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 200, "timeout_s": 0.2})
        assert answer.status_code == 200
        choice = answer.json()["choices"][0]
        assert (choice["finish_reason"], choice["finish_cause"]) == ("length", "deadline")
        assert 0 < len(choice["text"]) < 10
        server.engine.stuck = True
        began = time.monotonic()
        answer = server.post("/v1/completions", {"prompt": "x", "timeout_s": 0.2})
        assert time.monotonic() - began < 1
        assert answer.status_code == 504
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
        assert not server.service._active


def test_a_streamed_deadline_is_504_before_the_first_token_and_a_reason_after() -> None:
    with running(FakeEngine(step_s=0.05)) as server:
        body = {"prompt": "x", "max_tokens": 200, "timeout_s": 0.2, "stream": True}
        streamed = server.post("/v1/completions", body)
        assert streamed.status_code == 200
        chunks = [json.loads(line[6:]) for line in streamed.text.split("\n\n")[:-2]]
        end = chunks[-1]["choices"][0]
        assert (end["finish_reason"], end["finish_cause"]) == ("length", "deadline")
        assert 0 < len("".join(chunk["choices"][0]["text"] for chunk in chunks)) < 10
        server.engine.stuck = True
        late = server.post("/v1/completions", body)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    with running(FakeEngine(stuck=True), sse_keep_alive_s=0.05) as server:  # the status is out by then
        late = server.post("/v1/completions", body)
        assert late.status_code == 200
        assert json.loads(late.text.split("\n\n")[-3][6:])["error"]["code"] == "deadline_exceeded"


def test_requests_that_end_in_an_error_are_freed() -> None:
    """One exception for all of them kept the frames of each, and so all that a request holds."""

    def num_generations() -> int:
        gc.collect()
        return sum(isinstance(each, Generation) for each in gc.get_objects())

    body = {"prompt": "x", "timeout_s": 0.05, "stream": True}
    with running(FakeEngine(stuck=True), sse_keep_alive_s=0.005) as server:
        before = num_generations()
        for _ in range(5):
            assert "deadline_exceeded" in server.post("/v1/completions", body).text
        within(5, lambda: num_generations() <= before + 1)  # the last may be on its way


@dataclass
class Broken(FakeEngine):
    """Fails every sequence after some tokens."""

    good_tokens: int = 0

    def _advance(self, live: Any) -> SequenceOutput:
        if live.sent < self.good_tokens:
            return super()._advance(live)
        del self.live[live.request.request_id, live.index]
        return SequenceOutput(live.request.request_id, live.index, (), FinishReason.ERROR, error="kaput")


def test_engine_error_is_500_or_an_event() -> None:
    with running(Broken()) as server:
        for extra in ({"n": 2}, {"stream": True}):
            answer = server.post("/v1/completions", {"prompt": "x", **extra})
            assert answer.status_code == 500
            assert "kaput" in answer.json()["error"]["message"]
        server.engine.good_tokens = 2  # type: ignore[attr-defined]
        streamed = server.post("/v1/completions", {"prompt": "x", "stream": True}).text.split("\n\n")
        assert json.loads(streamed[-3][6:])["error"]["code"] == "engine_error"
        assert streamed[-2] == "data: [DONE]"
        assert server.service.admission.in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("place", ["start", "log", "view"])
def test_a_fault_after_admission_leaves_nothing(
    place: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between admission and the answer nobody was there to free the pages."""

    def fail(*args: object) -> None:
        raise RuntimeError("a bug")

    with running(FakeEngine(stuck=True)) as server:
        holder, name = {
            "start": (server.service.metrics, "begin"),
            "log": (server.service, "_log_prompts"),
            "view": (CompletionView, "__post_init__"),
        }[place]
        monkeypatch.setattr(holder, name, fail)
        answer = server.post("/v1/completions", {"prompt": "x", "stream": stream})
        assert answer.status_code == 500
        within(5, lambda: not (server.engine.live or server.service._active))
        assert server.service.admission.in_flight == 0


def test_per_token_cost_of_the_server_is_small() -> None:
    """Well below 100 µs a token, detokenising, encoding and metrics included."""
    import asyncio

    from scheduler.types import Request, SamplingParams
    from server.admission import Admission
    from server.buffers import Buffers
    from server.delivery import event
    from server.routes.chat import ChatView
    from server.streams import TextOptions
    from server.wire.requests import ChatRequest
    from tests.server.byte_tokenizer import ByteTokenizer
    from tests.server.http.conftest import make_service

    tokens = 2000
    engine = FakeEngine(max_model_len=5000)
    service = make_service(engine)
    request = Request(request_id="r-0", prompt_ids=(1,), sampling=SamplingParams(max_tokens=tokens))
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "stream": True})

    async def drive() -> float:
        await engine.start()
        generation = Generation(
            [request],
            TextOptions(),
            client=engine,
            tokenizer=ByteTokenizer(),  # type: ignore[arg-type]
            metrics=Metrics("m"),
            ticket=Admission(10).reserve("", 1),
            outgoing=Buffers(2**20).outgoing,
        )
        view = ChatView(service, body, generation)
        generation.start()
        began = time.process_time()
        async for deltas in generation.deltas(15.0):
            for delta in deltas:
                for chunk in view.chunks_of(delta):
                    event(chunk)
        spent = time.process_time() - began
        generation.close()
        await engine.close()
        return spent

    assert asyncio.run(drive()) / tokens < 300e-6  # the fake engine's step is inside; slow machines too
