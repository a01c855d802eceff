"""A scripted OpenAI-compatible server on a free port, for tests of clients."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass
class FakeServer:
    """Answers completions with as many tokens as asked for; what it saw is kept for assertions."""

    port: int = 0
    gap_s: float = 0.0
    has_tokenize: bool = True
    usage: bool = True
    done: bool = True
    refuse: bool = False  # completions get a 429
    break_after: int | None = None  # close the connection after this many chunks
    error_after: int | None = None  # send an error event instead of this chunk
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_connections: int = 0
    running: int = 0
    most_running: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.ensure_future(self.serve(reader, writer)))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while request := await self._read(reader):
                await self._answer(writer, *request)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]] | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.headers.append(headers)
        length = int(headers.get("content-length", 0))
        return first.split()[1], json.loads(await reader.readexactly(length) or b"{}") if length else {}

    async def _answer(self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> None:
        if path == "/v1/models":
            return self._json(writer, 200, {"data": [{"id": "fake"}]})
        if path == "/version":
            return self._json(writer, 200, {"version": "9.9"})
        if path == "/tokenize" and self.has_tokenize:
            return self._json(writer, 200, {"tokens": [1] * _count(body["prompt"])})
        if not path.endswith("/completions"):
            return self._json(writer, 404, {"error": {"message": "no such route"}})
        if not body.get("stream"):
            return self._json(writer, 200, {"usage": {"prompt_tokens": _count(body["prompt"])}})
        self.bodies.append(body)
        if self.refuse:
            return self._json(writer, 429, {"error": {"message": "queue is full"}})
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._stream(writer, body, chat="chat" in path)
        finally:
            self.running -= 1
        return None

    def _json(self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], *, chat: bool) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        _chunk(writer, b": ping\n\n")
        if chat:
            _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number in range(body["max_tokens"]):
            if number == self.break_after:
                writer.close()
                raise ConnectionError
            if number == self.error_after:
                _event(writer, {"error": {"message": "engine died"}})
                break
            text = f" t{number}"
            piece = {"delta": {"content": text}} if chat else {"text": text}
            _event(writer, {"choices": [{"index": 0, **piece, "finish_reason": None}]})
            await writer.drain()
            await asyncio.sleep(self.gap_s)
        if self.done and self.error_after is None:
            last = {"delta": {}} if chat else {"text": ""}
            _event(writer, {"choices": [{"index": 0, **last, "finish_reason": "length"}]})
        if self.usage:
            details = {"prompt_tokens_details": {"cached_tokens": 2}}
            prompt = body["messages"][-1]["content"] if chat else body["prompt"]
            counts = {"prompt_tokens": _count(prompt), "completion_tokens": body["max_tokens"], **details}
            _event(writer, {"choices": [], "usage": counts})
        if self.done:
            _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _count(text: str) -> int:
    """Two tokens for every word that starts with a, one for the others."""
    return sum(2 if word.startswith("a") else 1 for word in text.split())


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    _chunk(writer, f"data: {json.dumps(event)}\n\n".encode())


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@asynccontextmanager
async def fake_server(**options: Any) -> AsyncIterator[FakeServer]:
    fake = FakeServer(**options)
    listener = await asyncio.start_server(fake.accept, "127.0.0.1", 0)
    fake.port = listener.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        listener.close()
        for task in fake.tasks:
            task.cancel()
        await asyncio.gather(*fake.tasks, return_exceptions=True)
