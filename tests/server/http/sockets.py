"""Raw sockets against a server, for what no HTTP library would send."""

from __future__ import annotations

import json
import resource
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.http.conftest import Running

LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"
LAST_LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        code: str = json.loads(self.body)["error"]["code"]
        return code

    @property
    def text(self) -> str:
        """Of a completion."""
        text: str = json.loads(self.body)["choices"][0]["text"]
        return text


def connect(server: Running, timeout_s: float = 10.0) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


def head(path: str, *headers: str, method: str = "POST", version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def post(path: str, body: dict[str, Any], *headers: str, version: str = "1.1") -> bytes:
    raw = json.dumps(body).encode()
    return head(path, f"Content-Length: {len(raw)}", *headers, version=version) + raw


def read_all(client: socket.socket) -> bytes:
    """Until the server closes."""
    received = b""
    with suppress(ConnectionError):
        while piece := client.recv(65536):
            received += piece
    return received


def answers_in(received: bytes) -> list[Answer]:
    """Interim ones left out. One without a length goes to the end."""
    answers = []
    while received:
        raw_head, _, rest = received.partition(b"\r\n\r\n")
        status_line, *lines = raw_head.decode().split("\r\n")
        status = int(status_line.split()[1])
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if status < 200:
            received = rest
            continue
        body, received = _body(headers, rest)
        answers.append(Answer(status, headers, body))
    return answers


def _body(headers: dict[str, str], rest: bytes) -> tuple[bytes, bytes]:
    if "content-length" in headers:
        length = int(headers["content-length"])
        return rest[:length], rest[length:]
    if headers.get("transfer-encoding") != "chunked":
        return rest, b""
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
        if not length:
            break
    return body, rest


def text_of(stream: str | bytes) -> str:
    """Of a streamed completion."""
    events = stream.encode() if isinstance(stream, str) else stream
    chunks = [json.loads(line[6:]) for line in events.split(b"\n\n") if line.startswith(b"data: {")]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def send(server: Running, *pieces: bytes, gap_s: float = 0.0, shut: bool = False) -> list[Answer]:
    """Send the pieces -> the answers until the server closes. `shut`: the sending side, after the last."""
    with connect(server) as client:
        for piece in pieces:
            with suppress(ConnectionError):  # it may have closed already
                client.sendall(piece)
            time.sleep(gap_s)
        if shut:
            client.shutdown(socket.SHUT_WR)
        return answers_in(read_all(client))


@contextmanager
def many_files(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
