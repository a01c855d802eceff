"""One HTTP/1 connection, within bounds of bytes and of time.

uvicorn gives the server around this; its own protocol for httptools has no limit of these, loses the body
of a request that offers an upgrade, chunks for HTTP/1.0 and takes a shut sending side for a client that
left. What is refused here gets the error envelope before any of the application runs.

    new
     │ first byte
    head ── over max_header_bytes, not HTTP, half sent after head_timeout_s ──> 431, 400, 408
     │
    body ── over max_body_bytes, no room in the budget, not arriving ──> whoever reads it gets 413, 503, 408
     │
    answer ── unread for send_timeout_s ──> reset
     │
    idle ── keep_alive_timeout_s, or its place is wanted ──> closed
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import select
import socket
import struct
import sys
import termios
import urllib.parse
from collections import deque
from contextlib import suppress
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import msgspec

from server import logs
from server.errors import ApiError, unavailable
from server.exchange import Exchange, head_bytes
from server.middleware import QUIET_PATHS
from server.refusals import draining
from server.request_parser import RequestParser

if TYPE_CHECKING:
    import ssl

    from starlette.types import ASGIApp
    from uvicorn.server import ServerState

    from server.buffers import Backlog
    from server.connections import Connections
    from server.request_parser import Head

LINGER_S = 0.5  # a refused client is still read from, or the answer might be lost in a reset
RETRY_S = 1
HANGUP_CHECK_S = 0.2  # of clients that shut their sending side while they wait
MAX_PIPELINED = 16  # requests that a client may send ahead of their answers
MIN_BODY_BYTES_PER_S = 512  # on average, once body_timeout_s has passed
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Expects(Enum):
    """What a connection waits for from its client."""

    FIRST_BYTE = auto()  # of its first request
    HEAD = auto()  # begun
    BODY = auto()
    NEXT_BYTE = auto()  # idle, or being answered


class Connection(asyncio.Protocol):
    """One connection."""

    transport: asyncio.Transport  # these from `connection_made` on
    _socket: asyncio.Transport  # the same, or what TLS lies on
    backlog: Backlog

    def __init__(
        self, connections: Connections, app: ASGIApp, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._connections, self._limits = connections, connections.limits
        self._incoming = connections.buffers.incoming
        self._app, self._server_state, self._app_state = app, server_state, app_state
        self._greeting: asyncio.Task[None] | None = None  # in TLS
        self._early = b""
        # What comes in
        self._parser = RequestParser(self, self._limits.max_header_bytes)
        self._expects = Expects.FIRST_BYTE
        self._since_s = self.loop.time()  # when it began to wait for that
        self._last_byte_s = self._since_s
        self._is_deaf = False  # what comes is dropped
        self._has_place = False
        # Bytes: those of requests that are not accepted yet are held
        self._num_received = self._num_let_go = 0
        self._segment_begins_at = 0
        self._begins_at = 0  # the latest request, or a little earlier: the segment with its start
        self._body_bytes = 0
        self._receiving: Exchange | None = None  # whose body is arriving
        # What goes out
        self._exchanges: deque[Exchange] = deque()  # not answered yet; the first is being worked on
        self._last_words: ApiError | None = None  # after their answers
        self._is_writable = asyncio.Event()
        self._is_writable.set()
        self._num_stuck = 0  # bytes that the kernel did not take
        self._unread = (0, self._since_s)  # bytes on their way, and since when they are no fewer

    @property
    def is_answering(self) -> bool:
        return bool(self._exchanges)

    @property
    def is_read(self) -> bool:
        """Whether the kernel has all that was written."""
        return self._is_writable.is_set()

    @property
    def _num_held(self) -> int:
        return self._num_received - self._num_let_go

    @property
    def _is_idle(self) -> bool:
        return self._expects is Expects.NEXT_BYTE and not self._exchanges

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return self._server_state.default_headers

    # asyncio's side

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.backlog = self._connections.buffers.outgoing.open(self.abort)
        self._server_state.connections.add(self)  # type: ignore[arg-type]
        self._socket = transport
        self._use(transport)
        self._has_place = self._connections.enter(self)
        if self._connections.tls is not None:
            transport.pause_reading()
            self._greeting = self.loop.create_task(self._greet(self._connections.tls))

    def _use(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=1)  # so whatever the kernel does not take is known, and counts

    async def _greet(self, tls: ssl.SSLContext) -> None:
        """The handshake, which asyncio's server would do before anybody can count the connection."""
        try:
            transport = await self.loop.start_tls(
                self.transport,
                self,
                tls,
                server_side=True,
                ssl_handshake_timeout=self._limits.head_timeout_s,
                ssl_shutdown_timeout=self._limits.send_timeout_s,
            )
        except OSError:
            transport = None
        self._greeting = None
        if transport is None:  # it is gone, and asyncio does not always say so
            self.connection_lost(None)
            return
        self._use(transport)
        self._expect(Expects.FIRST_BYTE)
        if self._early:
            self.data_received(self._early)

    def connection_lost(self, error: Exception | None) -> None:
        """Idempotent."""
        self._server_state.connections.discard(self)
        self._connections.leave(self)
        self._is_deaf = True
        self._let_go(self._num_received)
        self.backlog.close()
        for exchange in self._exchanges:
            exchange.disconnect()
        self._exchanges.clear()
        self._is_writable.set()
        self._parser.close()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._greeting is not None:  # it came with the handshake's end, and cannot be answered yet
            self._early += data
            return
        self._last_byte_s = self.loop.time()
        if not self._incoming.has_room(self._num_held, len(data)):
            if self._receiving is None:
                self._expect(Expects.HEAD)  # it may be sending still, and shall read why not
            self._stop_receiving(_no_room())
            return
        self._incoming.take(len(data))
        self._num_received += len(data)
        self._segment_begins_at = self._num_received - len(data)
        try:
            self._parser.feed(data)
        except ApiError as error:
            if self._exchanges and not self._exchanges[-1].keep_alive and self._receiving is None:
                self._is_deaf = True  # what follows a last request is nobody's
            else:
                self._stop_receiving(error)
        if not (self._exchanges or self._is_deaf or self._expects is Expects.HEAD):
            self._let_go(self._num_received)  # empty lines between requests

    def eof_received(self) -> bool:
        """A client may shut its sending side and wait for its answer (`nc -N`); one that is gone looks the
        same until it is written to."""
        self._is_deaf = True
        if not self._exchanges or self._receiving or self.transport.get_extra_info("sslcontext"):
            return False
        self._exchanges[-1].keep_alive = False
        self._exchanges[0].poke()
        self.loop.call_later(HANGUP_CHECK_S, self._look_for_hangup)
        return True

    def _look_for_hangup(self) -> None:
        if self.transport.is_closing() or not self._exchanges:
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        if poll.poll(0):  # both directions are over
            self.abort()
        else:
            self.loop.call_later(HANGUP_CHECK_S, self._look_for_hangup)

    def pause_writing(self) -> None:
        self._is_writable.clear()
        self._unread = (self._bytes_on_their_way(), self.loop.time())
        self._num_stuck = self.transport.get_write_buffer_size()
        self.backlog.add(self._num_stuck)

    def resume_writing(self) -> None:
        self._is_writable.set()
        self.backlog.add(-self._num_stuck)
        self._num_stuck = 0

    async def writable(self) -> None:
        """Until the kernel has taken all that was written, or the connection is gone."""
        await self._is_writable.wait()

    # uvicorn's side

    def shutdown(self) -> None:
        """Close once the requests that are here have been answered. One that is not all here is refused."""
        if self._receiving is not None:
            self._stop_receiving(draining())
        if self._exchanges:
            self._exchanges[-1].keep_alive = False
        else:
            self.close()

    # The parser's side

    def begin_head(self) -> None:
        self._connections.note_idle(self, idle=False)
        self._expect(Expects.HEAD)
        self._body_bytes = 0
        self._begins_at = self._segment_begins_at

    def begin_request(self, head: Head) -> None:
        """Raises ApiError, which the request answers with where it has begun."""
        if len(self._exchanges) >= MAX_PIPELINED:
            self._exchanges[-1].keep_alive = False
            raise ApiError(429, "Too many requests ahead of their answers.")  # told by closing after the last
        if not self._has_place and head.path.rstrip(b"/").decode() not in QUIET_PATHS:
            raise unavailable("Too many open connections.", RETRY_S, "too_many_connections")
        announced = int(head.value_of(b"content-length") or b"0")
        keep_alive = head.keep_alive and self._has_place
        exchange = Exchange(self, self._scope(head), self._begins_at, keep_alive=keep_alive)
        if head.value_of(b"expect").lower() == b"100-continue" and head.version == "1.1":
            exchange.expect_continue()
        self._receiving = exchange
        self._expect(Expects.BODY)
        self._exchanges.append(exchange)
        if len(self._exchanges) == 1:
            self._run(exchange)
        if announced > self._limits.max_body_bytes:
            raise self._body_too_large()
        if announced and not self._incoming.has_room(self._num_held, announced):
            raise _no_room()

    def take_body(self, data: bytes) -> None:
        assert self._receiving is not None
        self._body_bytes += len(data)
        if self._receiving.feed(data) > self._limits.max_body_bytes:
            raise self._body_too_large()

    def end_request(self) -> None:
        assert self._receiving is not None
        exchange, self._receiving = self._receiving, None
        self._expect(Expects.NEXT_BYTE)
        exchange.complete()

    # Requests

    def _scope(self, head: Head) -> dict[str, Any]:
        transport = self.transport
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "server": _address(transport.get_extra_info("sockname")),
            "client": _address(transport.get_extra_info("peername")),
            "scheme": "https" if transport.get_extra_info("sslcontext") else "http",
            "root_path": "",
            "method": head.method,
            "path": urllib.parse.unquote(head.path.decode("ascii")),
            "raw_path": head.path,
            "query_string": head.query,
            "headers": head.headers,
            "state": self._app_state.copy(),
        }

    def _run(self, exchange: Exchange) -> None:
        task = self.loop.create_task(exchange.run(self._app))
        self._server_state.tasks.add(task)
        task.add_done_callback(self._server_state.tasks.discard)

    def answered(self, exchange: Exchange) -> None:
        """The last byte of its answer is written."""
        self.let_go()
        self._exchanges.popleft()
        self._server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if not exchange.keep_alive:
            self.close()
        elif self._exchanges:
            self._run(self._exchanges[0])
        elif self._last_words is not None:
            self._say(self._last_words)
        elif self._is_deaf:
            self.close()
        elif self._expects is Expects.NEXT_BYTE:
            self._expect(Expects.NEXT_BYTE)
            self._connections.note_idle(self, idle=True)

    def let_go(self) -> None:
        """What the request in hand was sent in is no longer needed: all that came before the next."""
        if len(self._exchanges) > 1:
            self._let_go(self._exchanges[1].begins_at)
        else:
            is_whole = self._expects is Expects.NEXT_BYTE or self._receiving is not None
            self._let_go(self._num_received if is_whole else self._begins_at)

    def _let_go(self, until: int) -> None:
        until = max(until, self._num_let_go)  # when the connection is lost all goes, and exchanges go on
        self._incoming.give_back(until - self._num_let_go)
        self._num_let_go = until

    # Time

    def _expect(self, what: Expects) -> None:
        self._expects = what
        self._since_s = self._last_byte_s = self.loop.time()

    def check(self, now_s: float) -> None:
        """Called about once a second."""
        if not self.is_read:
            self._check_reader(now_s)
        if self._is_deaf:
            return
        limits, waited_s = self._limits, now_s - self._since_s
        if self._expects is Expects.HEAD and waited_s > limits.head_timeout_s:
            message = f"The request's head did not arrive within {limits.head_timeout_s:g} s."
            self._stop_receiving(ApiError(408, message, code="head_timeout"))
        elif self._expects is Expects.BODY and self._is_body_too_slow(now_s):
            message = "The request's body does not arrive, or too slowly."
            self._stop_receiving(ApiError(408, message, code="body_timeout"))
        elif waited_s > self._silence_limit_s():
            self.close()

    def _silence_limit_s(self) -> float:
        """How long it may have nothing to do."""
        if self._expects is Expects.FIRST_BYTE:
            return self._limits.head_timeout_s
        return self._limits.keep_alive_timeout_s if self._is_idle else math.inf

    def _is_body_too_slow(self, now_s: float) -> bool:
        """Silent for too long, or a trickle. A steady sender has all the time that it needs."""
        limit_s = self._limits.body_timeout_s
        enough_s = limit_s + self._body_bytes / MIN_BODY_BYTES_PER_S
        return now_s - self._last_byte_s > limit_s or now_s - self._since_s > enough_s

    def _check_reader(self, now_s: float) -> None:
        num_bytes, since_s = self._unread
        if (now_bytes := self._bytes_on_their_way()) < num_bytes:
            self._unread = (now_bytes, now_s)
        elif now_s - since_s > self._limits.send_timeout_s:
            logs.log(logging.DEBUG, "reader timeout", unread_bytes=now_bytes)
            self.abort()

    def _bytes_on_their_way(self) -> int:
        """Here and in the kernel: the latter shows a slow reader's progress much earlier."""
        return self.transport.get_write_buffer_size() + _num_unacknowledged(self.transport)

    # The end

    def _stop_receiving(self, error: ApiError) -> None:
        """Nothing more is read. The request in hand gets the error; where there is only a part of a head,
        the client does, after the answers that are due."""
        self._is_deaf = True
        self._connections.metrics.count_refused(error.code or "other")
        if self._receiving is not None:
            self._receiving.refuse(error)
            if len(self._exchanges) == 1:
                self.let_go()
        elif self._exchanges:
            self._last_words = error
        else:
            self._say(error)

    def _say(self, error: ApiError) -> None:
        logs.log(logging.DEBUG, "connection refused", status=error.status, code=error.code)
        self.transport.write(_answer(error))
        self.close()

    def close(self) -> None:
        """Send what is written, and read on a little where the client may still be sending: closing on
        unread bytes would reset the connection, and the answer might be lost."""
        self._is_deaf = True
        self._connections.note_idle(self, idle=False)
        if self._expects is Expects.NEXT_BYTE or self._expects is Expects.FIRST_BYTE:
            self._hang_up()
            return
        if self.is_read and self.transport.can_write_eof():
            with suppress(OSError):  # it is gone
                self.transport.write_eof()
        self.loop.call_later(LINGER_S, self._hang_up)

    def _hang_up(self) -> None:
        """TLS waits for the client's farewell, which need not come."""
        self.transport.close()
        if self.is_read and self.transport is not self._socket:
            self.loop.call_later(LINGER_S, self._socket.close)

    def give_way(self) -> None:
        """Close at once. Whatever the client has not read of an earlier answer is still sent, if the kernel
        has it."""
        if self.is_read:
            self._hang_up()
        else:
            self.abort()

    def abort(self) -> None:
        """Reset: nothing that was written is sent any more, here or by the kernel."""
        with suppress(OSError, AttributeError):
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE
            )
        self.transport.abort()

    def _body_too_large(self) -> ApiError:
        message = f"The body is larger than {self._limits.max_body_bytes} bytes."
        return ApiError(413, message, code="body_too_large")


def _no_room() -> ApiError:
    return unavailable("The server holds as many bytes of requests as it may.", RETRY_S, "buffers_full")


def _answer(error: ApiError) -> bytes:
    body = msgspec.json.encode(error.envelope())
    headers = {
        **error.headers,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    return (
        head_bytes(error.status, [(name.encode(), value.encode()) for name, value in headers.items()]) + body
    )


def _num_unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes that the kernel holds until the client's has them; 0 where it does not tell."""
    try:
        raw = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, AttributeError):
        return 0
    return int.from_bytes(raw, sys.byteorder)


def _address(name: Any) -> tuple[str, int | None] | None:
    if isinstance(name, tuple):
        return str(name[0]), int(name[1])
    return (name, None) if isinstance(name, str) and name else None
