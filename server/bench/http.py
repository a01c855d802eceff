"""The least HTTP/1.1 that measures well: a request out, a body back in the pieces that arrive.

The client shares the machine with the server it measures, so what it costs per chunk is part of the
result. This costs some tens of microseconds; general clients cost many times that.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

READ_BYTES = 2**16
MAX_HEADER_BYTES = 2**16


class HttpError(Exception):
    """The other side does not speak HTTP/1.1 as expected, or left."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect. `base` is what precedes /v1 in every path."""

    host: str
    port: int
    secure: bool
    base: str
    api_key: str = ""

    @staticmethod
    def of(url: str, api_key: str = "") -> Target:
        """Raises ValueError unless it is an http or https URL; a trailing /v1 is dropped."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http URL")
        secure = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        return Target(parts.hostname, parts.port or (443 if secure else 80), secure, base, api_key)


class ChunkedDecoder:
    """Undoes `Transfer-Encoding: chunked` for input cut anywhere. `done` after the last chunk."""

    def __init__(self) -> None:
        self.done = False
        self._buffer = bytearray()
        self._remaining = 0  # bytes of the current chunk still to come
        self._step = self._size

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises HttpError on a malformed chunk."""
        self._buffer += data
        payload = bytearray()
        while not self.done and self._step(payload):
            pass
        return bytes(payload)

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEADER_BYTES:
                raise HttpError("a chunk header without an end")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _size(self, payload: bytearray) -> bool:
        line = self._line()
        if line is None:
            return False
        try:
            self._remaining = int(line.partition(b";")[0], 16)
        except ValueError:
            raise HttpError(f"bad chunk size {line[:20]!r}") from None
        self._step = self._data if self._remaining else self._trailer
        return True

    def _data(self, payload: bytearray) -> bool:
        piece = self._buffer[: self._remaining]
        payload += piece
        del self._buffer[: len(piece)]
        self._remaining -= len(piece)
        if self._remaining:
            return False
        self._step = self._after_data
        return True

    def _after_data(self, payload: bytearray) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._line() != b"":
            raise HttpError("a chunk longer than its size")
        self._step = self._size
        return True

    def _trailer(self, payload: bytearray) -> bool:
        line = self._line()
        self.done = line == b""
        return bool(line)


class Connection:
    """One connection, for one request at a time."""

    def __init__(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reusable = False  # after a body was read to its end, if the server agrees
        self._target = target
        self._reader = reader
        self._writer = writer
        self._headers: dict[str, str] = {}

    @classmethod
    async def open(cls, target: Target) -> Connection:
        ssl = True if target.secure else None
        return cls(target, *await asyncio.open_connection(target.host, target.port, ssl=ssl))

    @property
    def stale(self) -> bool:
        """Whether the server has closed it while it lay idle."""
        return self._reader.at_eof() or self._writer.is_closing()

    def close(self) -> None:
        self._writer.close()

    async def send(self, method: str, path: str, body: bytes = b"", *, keep_alive: bool = True) -> int:
        """Send a request and return the status of the answer, whose body comes from `pieces`."""
        target = self._target
        host = f"[{target.host}]" if ":" in target.host else target.host
        lines = [f"{method} {target.base}{path} HTTP/1.1", f"Host: {host}:{target.port}"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"Authorization: Bearer {target.api_key}"] if target.api_key else []
        lines += ["Connection: keep-alive" if keep_alive else "Connection: close", "", ""]
        self.reusable = False
        self._writer.write("\r\n".join(lines).encode("latin-1") + body)
        await self._writer.drain()
        return await self._read_head()

    async def _read_head(self) -> int:
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            status_line, *lines = head.decode("latin-1").split("\r\n")
            status = int(status_line.split(" ", 2)[1])
        except asyncio.IncompleteReadError:
            raise HttpError("the server closed the connection without an answer") from None
        except (ValueError, IndexError, asyncio.LimitOverrunError):
            raise HttpError("the answer is not HTTP") from None
        pairs = (line.partition(":") for line in lines if line)
        self._headers = {name.lower(): value.strip() for name, _, value in pairs}
        return status

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body in the pieces that arrive. Raises HttpError when it is cut short."""
        headers = self._headers
        if headers.get("transfer-encoding", "").lower() == "chunked":
            decoder = ChunkedDecoder()
            while not decoder.done:
                yield decoder.feed(await self._read(READ_BYTES))
        elif "content-length" in headers:
            remaining = int(headers["content-length"])
            while remaining:
                data = await self._read(min(READ_BYTES, remaining))
                remaining -= len(data)
                yield data
        else:
            while data := await self._reader.read(READ_BYTES):
                yield data
            return
        self.reusable = headers.get("connection", "").lower() != "close"

    async def _read(self, limit: int) -> bytes:
        data = await self._reader.read(limit)
        if not data:
            raise HttpError("the server closed the connection in the middle of the body")
        return data

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])
