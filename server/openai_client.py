"""A small blocking client of an OpenAI-compatible server, on the standard library.

`octavo chat` and `octavo complete` want to start at once and to be interrupted at any time; both
come for free with `http.client`, which also undoes the chunked encoding of a stream.
"""

from __future__ import annotations

import http.client
import json
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


class ApiError(Exception):
    """The server refused, failed, or is not there. The text is one line."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What a finished stream took. Times in seconds; tokens as the server counted them."""

    first_s: float
    total_s: float
    output_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first, which is the speed that a reader sees."""
        span = self.total_s - self.first_s
        return (self.output_tokens - 1) / span if span > 0 and self.output_tokens > 1 else 0.0


class OpenAIClient:
    """One server. Every call opens its own connection; leaving a stream early closes it, which aborts
    the request on the server."""

    def __init__(self, url: str, api_key: str = "", timeout_s: float = 600.0) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._port = parts.port  # read here because reading is what checks it
        except ValueError as error:
            raise ApiError(f"{url!r} is no http URL: {error}") from None
        host = parts.hostname or ""
        if parts.scheme not in ("http", "https") or not host or any(char.isspace() for char in host):
            raise ApiError(f"{url!r} is no http URL")
        self.url = url
        self.timing: Timing | None = None  # of the latest stream that ended by itself
        self._parts = parts
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        """The id of the first model that the server lists."""
        with closing(self._connect()) as connection:
            answer = json.load(self._send(connection, "GET", "/v1/models", None))
        if not answer.get("data"):
            raise ApiError(f"{self.url} serves no model")
        return str(answer["data"][0]["id"])

    def stream(self, path: str, body: dict[str, Any]) -> Generator[str]:
        """POST with `stream` on; yields the text of choice 0 as it comes. Raises ApiError."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self.timing = None
        start_s = time.perf_counter()
        first_s, output_tokens = 0.0, 0
        with closing(self._connect()) as connection:
            for event in self._events(self._send(connection, "POST", path, body)):
                output_tokens = (event.get("usage") or {}).get("completion_tokens", output_tokens)
                text = _text_of(event)
                if text:
                    first_s = first_s or time.perf_counter() - start_s
                    yield text
        self.timing = Timing(first_s, time.perf_counter() - start_s, output_tokens)

    def _connect(self) -> http.client.HTTPConnection:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._parts.hostname
        return kind(self._parts.hostname, self._port, timeout=self._timeout_s)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> http.client.HTTPResponse:
        base = self._parts.path.rstrip("/").removesuffix("/v1")
        try:
            connection.request(method, base + path, json.dumps(body) if body else None, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ApiError(f"{response.status}: {_message(response.read())}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            # ValueError: a key or host name that HTTP cannot carry.
            raise ApiError(f"cannot reach {self.url}: {error}") from None
        return response

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        try:
            for line in response:
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data == b"[DONE]":
                    return
                if data:
                    event: dict[str, Any] = json.loads(data)
                    if "error" in event:
                        raise ApiError(_message(data))
                    yield event
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(f"the stream broke: {error}") from None
        raise ApiError("the stream ended without [DONE]")


def _text_of(event: dict[str, Any]) -> str:
    for choice in event.get("choices") or ():
        return choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return ""


def _message(body: bytes) -> str:
    """The message of an error envelope, or the start of whatever else was sent, on one line."""
    text = body.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:500] or "no message"
