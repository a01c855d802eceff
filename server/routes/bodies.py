"""Reading a body: small ones on the event loop, large and compressed ones in a worker thread."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, TypeVar

from server.errors import ApiError, invalid
from server.wire.body import check_content_type

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from server.service import Service

T = TypeVar("T")

MAX_LOOP_BODY_BYTES = 2**16  # parsing and checking this much takes a millisecond or two
PLAIN = ("", "identity")
MAX_MEMBERS = 16  # each costs a copy of what follows it
GZIP_OR_ZLIB, BARE = 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS
CODINGS = {"gzip": (GZIP_OR_ZLIB,), "x-gzip": (GZIP_OR_ZLIB,), "deflate": (GZIP_OR_ZLIB, BARE)}


async def read_body(
    request: Request,
    service: Service,
    parse: Callable[[bytes], T],
    *,
    max_loop_bytes: int = MAX_LOOP_BODY_BYTES,
) -> T:
    """What `parse` makes of the body. It must not touch what belongs to the loop. Raises ApiError."""
    check_content_type(request)
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in PLAIN and coding not in CODINGS:
        message = f"content-encoding must be gzip, deflate or identity, not {coding[:40]!r}."
        raise ApiError(415, message, param="content-encoding", code="unsupported_content_encoding")
    # Not request.body(), which keeps the bytes as long as the request lives: the length of a stream.
    raw = b"".join([piece async for piece in request.stream()])
    if len(raw) <= max_loop_bytes and coding in PLAIN:
        return parse(raw)
    max_bytes = service.config.server.max_body_bytes
    return await service.threads.run_bounded(lambda: parse(decoded(raw, coding, max_bytes)))


def decoded(raw: bytes, coding: str, max_bytes: int) -> bytes:
    """Without its content coding. Raises ApiError: 400 where it is damaged, 413 where it grows too large."""
    if coding in PLAIN:
        return raw
    failure = ""
    for kind in CODINGS[coding]:
        try:
            return _inflated(raw, kind, max_bytes)
        except (zlib.error, EOFError) as error:
            failure = failure or str(error)
    raise invalid(
        f"The body is not what content-encoding says: {failure}.", "content-encoding", "invalid_encoding"
    )


def _inflated(raw: bytes, kind: int, max_bytes: int) -> bytes:
    """Never more than one byte beyond `max_bytes` is made, whatever the ratio. A file of gzip may have
    several members."""
    whole = bytearray()
    for _ in range(MAX_MEMBERS):
        inflater = zlib.decompressobj(kind)
        whole += inflater.decompress(raw, max_bytes + 1 - len(whole))
        if len(whole) > max_bytes:
            raise ApiError(413, f"The decoded body is larger than {max_bytes} bytes.", code="body_too_large")
        if not inflater.eof:
            raise EOFError("it ends early")
        raw = inflater.unused_data
        if not raw:
            return bytes(whole)
    raise EOFError(f"more than {MAX_MEMBERS} members")
