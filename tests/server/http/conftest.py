"""A real uvicorn on a free port around the fake engine; each test may start its own variant."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from engine.config import EngineConfig
from scheduler.config import SchedulerConfig
from server.chat_messages import TemplateTraits, fit_messages
from server.config import Config, ServerConfig
from server.generation_defaults import GenerationDefaults
from server.listener import listen, url_of
from server.serve import http_server
from server.service import Service
from tests.server.byte_tokenizer import EOS, ByteTokenizer
from tests.server.fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODEL = "org/fake"


class PlainTemplate:
    """role: content, one message a line."""

    source = "{# role: content #}"

    def encode(
        self,
        tokenizer: ByteTokenizer,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **rest: Any,
    ) -> tuple[str, list[int]]:
        fitted = fit_messages(messages, TemplateTraits(), developer=False)
        lines = [f"{message['role']}: {message['content']}\n" for message in fitted]
        text = "".join(lines) + ("assistant: " if add_generation_prompt else "")
        return text, tokenizer.encode(text, special=True)

    def check(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Running:
    """A server in a thread of its own, and handles on what is inside."""

    url: str
    service: Service
    engine: FakeEngine
    loop: asyncio.AbstractEventLoop

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=10, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", {"prompt": "hi", **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metrics(self) -> dict[str, float]:
        """Samples by `name{labels}`."""
        lines = [line for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def num_ended(self, reason: str) -> float:
        labels = f'engine="0",finished_reason="{reason}",model_name="{MODEL}"'
        return self.metrics()[f"vllm:request_success_total{{{labels}}}"]

    def call(self, work: Callable[[], Any]) -> Any:
        """Run something on the server's loop."""

        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)


def make_service(
    engine: FakeEngine, tokenizer: ByteTokenizer | None = None, policy: str = "mlfq", **settings: Any
) -> Service:
    of_engine = {name: settings.pop(name) for name in ("decoding", "drafter") if name in settings}
    config = Config(
        server=ServerConfig(**{"port": 0, **settings}),
        engine=EngineConfig(scheduler=SchedulerConfig(policy=policy), **of_engine),
    )
    checkpoint = SimpleNamespace(
        name=MODEL,
        bos_token_id=None,
        special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"},
        generation_problem=None,
        transformer=SimpleNamespace(max_positions=engine.max_model_len),
    )
    defaults = GenerationDefaults(eos_token_ids=(EOS,))
    return Service(config, tokenizer or ByteTokenizer(), PlainTemplate(), checkpoint, engine, defaults)  # type: ignore[arg-type]


@contextmanager
def running(
    engine: FakeEngine | None = None,
    *,
    start_engine: bool = True,
    capacity: int | None = None,
    tokenizer: ByteTokenizer | None = None,
    **settings: Any,
) -> Iterator[Running]:
    started = threading.Event()
    box: list[Running] = []
    stop: list[Callable[[], None]] = []

    async def main() -> None:
        fake = engine or FakeEngine()
        service = make_service(fake, tokenizer, **settings)
        if capacity is not None:
            service.admission.capacity = capacity
        listener = listen(service.config.server)
        server = http_server(service)
        server.config.timeout_graceful_shutdown = 1
        if start_engine:
            await fake.start()
        box.append(
            Running(
                url_of(listener, tls=server.connections.tls is not None),
                service,
                fake,
                asyncio.get_running_loop(),
            )
        )
        stop.append(lambda: setattr(server, "should_exit", True))
        started.set()
        try:
            await server.serve(sockets=[listener])
        finally:
            await fake.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(10)
    try:
        yield box[0]
    finally:
        stop[0]()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """The default server, shared by tests that leave nothing behind."""
    with running() as shared:
        yield shared
