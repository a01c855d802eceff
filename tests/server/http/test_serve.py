"""The process: listening before ready, draining on SIGTERM, exit statuses."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.server.http.sockets import answers_in, head, read_all

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = """
import asyncio, signal, sys
from msgspec.structs import replace
from engine.client import EngineDead
from engine.messages import SequenceOutput
from scheduler.types import FinishReason
from server.listener import bind
from server.serve import serve
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import make_service

class Dying(FakeEngine):
    async def start(self):
        raise EngineDead("no such model")

class Tiered(FakeEngine):
    async def start(self):
        self.ready = replace(await super().start(), host_pages=30, disk_pages=400)
        return self.ready

def give_up(engine):
    \"\"\"As the engine's client does: the cause first, then an error for every sequence.\"\"\"
    engine.dead.set_result("killed thrice")
    for request_id, index in list(engine.live):
        output = SequenceOutput(request_id, index, finish=FinishReason.ERROR, error="killed thrice")
        engine.sinks[request_id](output)
    engine.live.clear()

async def main():
    kind, drain_timeout_s = sys.argv[1], float(sys.argv[2])
    kinds = {"dying": Dying, "tiers": Tiered}
    engine = kinds.get(kind, FakeEngine)(step_s=0.5 if kind == "slow" else 0.02)
    service = make_service(engine, port=0, log_format="json", drain_timeout_s=drain_timeout_s)
    loop = asyncio.get_running_loop()
    if kind == "dies":
        loop.call_later(0.5, give_up, engine)
    if kind == "dies while draining":
        drain = service.drain
        def drain_and_die():
            loop.call_later(0.2, give_up, engine)
            return drain()
        service.drain = drain_and_die
    host = "0.0.0.0" if kind == "open" else "127.0.0.1"
    return await serve(service, service.config, bind(host, 0))

sys.exit(asyncio.run(main()))
"""


class Process:
    def __init__(self, kind: str, drain_timeout_s: float) -> None:
        command = [sys.executable, "-c", SCRIPT, kind, str(drain_timeout_s)]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.seen: list[str] = []

    def next_event(self, name: str) -> dict[str, object]:
        """Log lines up to the one of that event."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.seen.append(line)
            if line.startswith("{") and (event := json.loads(line))["event"] == name:
                return event  # type: ignore[no-any-return]
        raise AssertionError(f"no {name!r} in {self.seen}")


@contextmanager
def process(kind: str = "plain", drain_timeout_s: float = 10.0) -> Iterator[Process]:
    started = Process(kind, drain_timeout_s)
    try:
        yield started
    finally:
        started.popen.kill()
        started.popen.communicate(timeout=10)


@contextmanager
def open_stream(server: Process) -> Iterator[None]:
    """A stream of 250 tokens that is under way and stays open."""
    url = str(server.next_event("listening")["url"])
    server.next_event("ready")
    body = {"prompt": "x", "max_tokens": 250, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as stream:
        # Held on to: when the iterator is collected, httpx closes the connection, and the server, with
        # nobody left to answer, has drained.
        pieces = stream.iter_raw()
        next(pieces)
        yield


@pytest.mark.parametrize(("kind", "pages"), [("plain", (None, None)), ("tiers", (30, 400))])
def test_the_log_tells_of_host_and_disk_pages_where_there_are_any(
    kind: str, pages: tuple[int | None, int | None]
) -> None:
    with process(kind) as server:
        ready = server.next_event("ready")
        assert (ready.get("host_pages"), ready.get("disk_pages")) == pages


def test_sigterm_drains_and_exits_0() -> None:
    with process() as server:
        url = str(server.next_event("listening")["url"])
        server.next_event("ready")
        texts: list[str] = []
        body = {"prompt": "x", "max_tokens": 40, "stream": True}

        def run() -> None:
            texts.append(httpx.post(f"{url}/v1/completions", json=body, timeout=20).text)

        client = threading.Thread(target=run)
        client.start()
        while "vllm:num_requests_running" in (page := httpx.get(f"{url}/metrics").text):
            if 'vllm:num_requests_running{engine="0",model_name="org/fake"} 1.0' in page:
                break
        server.popen.send_signal(signal.SIGTERM)
        server.next_event("draining")
        refused = httpx.post(f"{url}/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert server.popen.wait(10) == 0
        client.join(5)
        assert texts[0].count('"text":') == 41  # the end is in a chunk of its own
        assert texts[0].endswith("[DONE]\n\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_at_once(number: signal.Signals) -> None:
    with process() as server:
        server.next_event("ready")
        server.popen.send_signal(number)
        assert server.popen.wait(5) == 0


def test_second_signal_does_not_wait() -> None:
    with process("slow", drain_timeout_s=60) as server, open_stream(server):
        server.popen.send_signal(signal.SIGTERM)
        server.next_event("draining")
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(10) == 1
        assert server.popen.stderr is not None
        assert "Traceback" not in server.popen.stderr.read()


def test_a_body_that_is_not_all_here_is_refused_and_holds_up_no_stop() -> None:
    with process() as server:
        url = str(server.next_event("listening")["url"])
        server.next_event("ready")
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(head("/v1/completions", "Content-Length: 100") + b"{")
            assert httpx.get(f"{url}/live").status_code == 200  # so it has arrived
            server.popen.send_signal(signal.SIGTERM)
            [answer] = answers_in(read_all(client))
        assert (answer.status, answer.code) == (503, "draining")
        assert server.popen.wait(10) == 0
        assert server.popen.stderr is not None
        assert "error" not in server.popen.stderr.read()


def test_an_engine_that_gives_up_while_draining_is_status_1() -> None:
    with process("dies while draining", drain_timeout_s=60) as server, open_stream(server):
        server.popen.send_signal(signal.SIGTERM)
        assert server.next_event("engine dead")["cause"] == "killed thrice"
        assert server.popen.wait(10) == 1


def test_an_open_server_without_keys_is_told_so() -> None:
    with process("open") as server:
        assert server.next_event("no api_keys: whoever reaches this address may use it")["level"] == "warning"
        server.next_event("ready")
    with process() as server:
        server.next_event("ready")
        assert not [line for line in server.seen if "no api_keys" in line]


@pytest.mark.parametrize(("kind", "cause"), [("dying", "no such model"), ("dies", "killed thrice")])
def test_engine_death_is_one_line_and_status_1(kind: str, cause: str) -> None:
    with process(kind) as server:
        assert server.next_event("engine dead")["cause"] == cause
        assert server.popen.wait(5) == 1
