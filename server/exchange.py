"""One request and its answer on a connection: what the application receives and sends (ASGI).

The body is handed over whole: every route wants it so, and a body that may not come is refused as soon as
that is known, by an ApiError that whoever reads the body meets.
"""

from __future__ import annotations

import asyncio
import http
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import ClientDisconnect

from server import logs

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

    from server.buffers import Backlog
    from server.errors import ApiError

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
COMMENT = b":\n\n"  # of an event stream: clients skip it
PIECE_BYTES = 2**16  # a large body is written piece by piece, as the client reads it
EVENT_STREAM = b"text/event-stream"
WITHOUT_BODY = (204, 304)
EXTENSION = "octavo"  # of ASGI: the exchange itself


class Carrier(Protocol):
    """The connection, as far as an exchange uses it."""

    transport: asyncio.Transport
    backlog: Backlog

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]: ...
    @property
    def is_read(self) -> bool: ...
    async def writable(self) -> None: ...
    def let_go(self) -> None: ...
    def answered(self, exchange: Exchange) -> None: ...
    def abort(self) -> None: ...


class Exchange:
    def __init__(self, connection: Carrier, scope: Scope, begins_at: int, *, keep_alive: bool) -> None:
        self.scope = scope
        self.begins_at = begins_at  # in the connection's bytes
        scope["extensions"] = {EXTENSION: self}
        self.keep_alive = keep_alive
        self.is_received = False  # the whole body is here
        self.is_answered = False
        self.is_disconnected = False
        self._connection = connection
        self._waits_for_continue = False
        self._body = bytearray()
        self._body_given = False
        self._refusal: ApiError | None = None
        self._news = asyncio.Event()
        self._head: bytes | None = None  # of the answer, until its first bytes are there
        self._has_begun = False
        self._is_chunked = False
        self._is_event_stream = False

    # The connection's side

    def expect_continue(self) -> None:
        self._waits_for_continue = True

    def feed(self, data: bytes) -> int:
        """More of the body -> its bytes so far."""
        if self._refusal is None and not self.is_answered:
            self._body += data
        return len(self._body)

    def refuse(self, error: ApiError) -> None:
        """The body will not come: whoever reads it gets the error, whose answer ends the connection."""
        self._refusal, self._body = error, bytearray()
        self._news.set()

    def complete(self) -> None:
        self.is_received = True
        self._news.set()

    def disconnect(self) -> None:
        self.is_disconnected = True
        self._news.set()

    def poke(self) -> None:
        """Send what changes nothing. A client that only waits skips it; one that is gone resets, and that
        is how one learns which it is."""
        if self._is_event_stream and self._has_begun:
            self._connection.transport.write(self._framed(COMMENT))
        elif not self._has_begun and self.scope["http_version"] == "1.1":
            self._connection.transport.write(CONTINUE)

    # The application's side: ASGI, and two words about memory

    def accept(self) -> None:
        """The body is read and its request accepted: it counts no more as held."""
        self._connection.let_go()

    def reset_if_unread(self) -> None:
        """Cut the answer off if the client is not reading it."""
        if self._has_begun and not self._connection.is_read:
            self._connection.abort()

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except ClientDisconnect:
            pass
        except Exception:
            logs.logger.exception("request failed outside of the application")
        finally:
            if not self.is_answered and not self.is_disconnected:
                self._connection.abort()  # the client must not take what it has for the whole

    async def receive(self) -> Message:
        """The body in one message, then the disconnect. Raises ApiError for a body that may not come."""
        if not self._body_given:
            await self._until_received()
            if not self.is_disconnected:
                self._body_given = True
                body, self._body = bytes(self._body), bytearray()
                return {"type": "http.request", "body": body, "more_body": False}
        while not (self.is_disconnected or self.is_answered):
            self._news.clear()
            await self._news.wait()
        return {"type": "http.disconnect"}

    async def _until_received(self) -> None:
        if self._waits_for_continue and not self._has_begun and not self.is_received and not self._refusal:
            self._waits_for_continue = False
            self._connection.transport.write(CONTINUE)
        while not (self.is_received or self.is_disconnected):
            if self._refusal is not None:
                raise self._refusal
            self._news.clear()
            await self._news.wait()

    async def send(self, message: Message) -> None:
        """As bytes, once the client has taken the earlier ones. Raises ClientDisconnect if it is gone."""
        if message["type"] == "http.response.start":
            self._head = self._head_of(message["status"], message["headers"])
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.scope["method"] == "HEAD":
            body = b""
        if len(body) > PIECE_BYTES and not self._is_chunked:
            await self._write(self._begun())
            await self._write_in_pieces(body)
        else:
            await self._write(self._begun() + self._framed(body, last=not more))
        if self.is_disconnected:
            raise ClientDisconnect
        if not more:
            self.is_answered = True
            self._news.set()
            self._connection.answered(self)

    def _begun(self) -> bytes:
        """The head goes out with the first bytes of the body, in one packet."""
        head, self._head = self._head, None
        if head is None:
            return b""
        self._has_begun = True
        return head

    def _head_of(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        names = {name.lower(): value for name, value in headers}
        has_length = b"content-length" in names or status in WITHOUT_BODY or self.scope["method"] == "HEAD"
        is_old = self.scope["http_version"] == "1.0"
        self._is_chunked = not (has_length or is_old)
        self._is_event_stream = names.get(b"content-type", b"").startswith(EVENT_STREAM)
        if b"close" in names.get(b"connection", b"") or not self.is_received or (is_old and not has_length):
            self.keep_alive = False
        lines = [*self._connection.default_headers, *headers]
        if self._is_chunked:
            lines.append((b"transfer-encoding", b"chunked"))
        if not self.keep_alive and b"connection" not in names:
            lines.append((b"connection", b"close"))
        elif self.keep_alive and is_old:
            lines.append((b"connection", b"keep-alive"))
        return head_bytes(status, lines)

    def _framed(self, body: bytes, *, last: bool = False) -> bytes:
        if not self._is_chunked:
            return body
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return chunk + b"0\r\n\r\n" if last else chunk

    async def _write(self, data: bytes) -> None:
        await self._connection.writable()
        if not self.is_disconnected:
            self._connection.transport.write(data)

    async def _write_in_pieces(self, data: bytes) -> None:
        """What the client has not read yet counts as held output."""
        connection, view = self._connection, memoryview(data)
        connection.backlog.add(len(data))
        for start in range(0, len(data), PIECE_BYTES):
            await connection.writable()
            if self.is_disconnected:
                return
            piece = view[start : start + PIECE_BYTES]
            connection.backlog.add(-len(piece))
            connection.transport.write(piece)


def exchange_of(scope: Scope) -> Exchange:
    """Of any request that came over a connection of ours."""
    exchange: Exchange = scope["extensions"][EXTENSION]
    return exchange


def head_bytes(status: int, headers: list[tuple[bytes, Any]]) -> bytes:
    """Values come from starlette, which encodes them; a line break in one would begin another header."""
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    lines = [f"HTTP/1.1 {status} {phrase}".encode()]
    for name, value in headers:
        if b"\r" in value or b"\n" in value:
            raise ValueError(f"the header {name!r} holds a line break")
        lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join([*lines, b"", b""])
