"""From bytes to requests: httptools, with a bound on heads and nothing that could be read in two ways.

Refused is by an ApiError out of `feed`, after which the parser is of no more use. httptools buffers a
header until it is whole, so two counts bound a head: what was told of it, and what came since anything was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import httptools

from server.errors import ApiError

HEADER_BYTES = 32  # that a header counts beside its text, as in HTTP/2: small ones take more memory than text
VERSIONS = ("1.0", "1.1")


@dataclass(frozen=True, slots=True)
class Head:
    method: str
    version: str
    path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]  # names in lower case
    keep_alive: bool

    def value_of(self, name: bytes) -> bytes:
        """Of the last header of that name; empty if there is none."""
        return dict(self.headers).get(name, b"")


class Receiver(Protocol):
    """Who takes the requests as they arrive. An ApiError out of these ends the parsing."""

    def begin_head(self) -> None: ...

    def begin_request(self, head: Head) -> None: ...

    def take_body(self, data: bytes) -> None: ...

    def end_request(self) -> None: ...


class RequestParser:
    def __init__(self, receiver: Receiver, max_header_bytes: int) -> None:
        self._receiver, self._max_header_bytes = receiver, max_header_bytes
        self._parser: Any = httptools.HttpRequestParser(self)
        self._head_bytes = self._untold_bytes = 0
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._is_in_body = False

    def feed(self, data: bytes) -> None:
        """Raises ApiError."""
        self._untold_bytes += len(data)
        self._feed(data)
        if self._untold_bytes > self._max_header_bytes:
            raise self._head_too_large()

    def close(self) -> None:
        """The two refer to each other."""
        self._parser = None

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            raise cause if isinstance(cause, ApiError) else _no_http(error) from None

    def _ignore_upgrade(self, rest: bytes) -> None:
        """RFC 9110 7.8: whoever does not take an upgrade goes on as if it was not offered. The parser has
        ended the request at its head, so another one gets the head without the offer, then the rest."""
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self._url, version)]
        lines += [b"%b: %b" % header for header in self._headers if header[0] != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join([*lines, b"", b""]) + rest)

    # What httptools calls

    def on_message_begin(self) -> None:
        self._head_bytes = self._untold_bytes = 0
        self._url, self._headers, self._is_in_body = b"", [], False
        self._receiver.begin_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + HEADER_BYTES)
        if not self._is_in_body:  # else it is a trailer, which no guard before us looks at
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser, method, version = self._parser, self._parser.get_method(), self._parser.get_http_version()
        if version not in VERSIONS:
            raise _other_version()
        if method == b"CONNECT":
            raise ApiError(405, "The method CONNECT is not supported.", code="method_not_allowed")
        if parser.should_upgrade():
            return  # see _ignore_upgrade
        self._check_codings(version)
        url = httptools.parse_url(self._url)
        self._is_in_body = True
        self._receiver.begin_request(
            Head(
                method=method.decode("ascii"),
                version=version,
                path=url.path or b"/",
                query=url.query or b"",
                headers=self._headers,
                keep_alive=parser.should_keep_alive(),
            )
        )

    def on_body(self, body: bytes) -> None:
        self._untold_bytes = 0
        self._receiver.take_body(body)

    def on_message_complete(self) -> None:
        self._untold_bytes = 0
        if self._is_in_body:  # and not at the head of an upgrade
            self._is_in_body = False
            self._receiver.end_request()

    def _check_codings(self, version: str) -> None:
        codings = {value.strip().lower() for name, value in self._headers if name == b"transfer-encoding"}
        if codings - {b"chunked"}:
            message = "The only transfer encoding that is supported is chunked."
            raise ApiError(501, message, code="unsupported_transfer_encoding")
        if codings and version == "1.0":
            raise ApiError(400, "HTTP/1.0 has no transfer encodings.", code="invalid_http")

    def _count(self, num_bytes: int) -> None:
        self._untold_bytes = 0
        self._head_bytes += num_bytes
        if self._head_bytes > self._max_header_bytes:
            raise self._head_too_large()

    def _head_too_large(self) -> ApiError:
        message = f"The request line and headers are larger than {self._max_header_bytes} bytes."
        return ApiError(431, message, code="headers_too_large")


def _no_http(error: httptools.HttpParserError) -> ApiError:
    if "PRI" in str(error) or "version" in str(error):
        return _other_version()
    return ApiError(400, f"This is not valid HTTP: {error}.", code="invalid_http")


def _other_version() -> ApiError:
    return ApiError(505, "The only protocol that is served is HTTP/1.", code="http_version_not_supported")
