"""HTTP connections within bounds: how many there are, and how large a request's head may be.

uvicorn's protocol bounds neither, and answers what is no HTTP in plain text. What is refused here gets
the error envelope before any of the application runs.

    connection ── over max_connections ──> 503, closed
        └── head over max_header_bytes ──> 431, closed
        └── no HTTP ─────────────────────> 400, closed
        └── a request ───────────────────> the application
"""

from __future__ import annotations

import http
import logging
from typing import TYPE_CHECKING, Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server import logs
from server.errors import ApiError, unavailable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

LINGER_S = 0.5  # a refused client is still read from, or the answer might be lost in a reset
RETRY_S = 1


def bounded_http(max_header_bytes: int, max_connections: int) -> Callable[..., BoundedProtocol]:
    """What uvicorn makes its connections with."""

    def connection(**options: Any) -> BoundedProtocol:
        return BoundedProtocol(max_header_bytes, max_connections, **options)

    return connection


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The parser buffers a header until it is whole, so two counts bound the head:
    what the parser has told of it, and what it was fed since it last told anything."""

    def __init__(self, max_header_bytes: int, max_connections: int, **options: Any) -> None:
        super().__init__(**options)
        self._max_header_bytes = max_header_bytes
        self._max_connections = max_connections
        self._head_bytes = 0
        self._untold_bytes = 0
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        surplus = len(self.connections) - self._max_connections
        if surplus > 0:
            if surplus == 1:  # told once per time that the limit is reached
                logs.log(logging.WARNING, "too many connections", max_connections=self._max_connections)
            self._refuse(unavailable("Too many open connections.", RETRY_S, "too_many_connections"))

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._untold_bytes += len(data)
        super().data_received(data)
        if self._untold_bytes > self._max_header_bytes and not self._refused:
            self._refuse(self._too_large())

    def send_400_response(self, msg: str) -> None:
        """What the parser could not take, a head that a callback below found too large included."""
        too_large = self._head_bytes > self._max_header_bytes
        self._refuse(self._too_large() if too_large else ApiError(400, msg, code="invalid_http"))

    def on_message_begin(self) -> None:
        self._head_bytes = self._untold_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._untold_bytes = 0
        super().on_body(body)

    def _count(self, num_bytes: int) -> None:
        """An exception ends the parsing and comes out as `send_400_response`."""
        self._untold_bytes = 0
        self._head_bytes += num_bytes
        if self._head_bytes > self._max_header_bytes:
            raise ValueError("the head is too large")

    def _too_large(self) -> ApiError:
        message = f"The request line and headers are larger than {self._max_header_bytes} bytes."
        return ApiError(431, message, code="headers_too_large")

    def _refuse(self, error: ApiError) -> None:
        self._refused = True
        logs.log(logging.DEBUG, "connection refused", status=error.status, code=error.code)
        self.transport.write(_response(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _response(error: ApiError) -> bytes:
    body = msgspec.json.encode(error.envelope())
    headers = {**error.headers, "content-type": "application/json", "content-length": len(body)}
    lines = [f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode() + body
