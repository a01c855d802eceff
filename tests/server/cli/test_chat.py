"""`octavo chat` and `octavo complete` against a scripted server, as a user or a pipe runs them."""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from server import cli
from server.openai_client import ApiError, OpenAIClient, Timing

if TYPE_CHECKING:
    from collections.abc import Iterator


class Script(ThreadingHTTPServer):
    """Answers every stream with `pieces`; a piece that is a dict is sent as the event itself."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pieces: list[str | dict[str, Any]] = ["Hel", "lo ", "✓"]
        self.status = 200
        self.cut = False  # no [DONE]
        self.seen: list[tuple[str, dict[str, Any], str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Script

    def do_GET(self) -> None:
        self._answer(b'{"data": [{"id": "first-model"}]}', 200)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization", "")))
        if self.server.status != 200:
            self._answer(b'{"error": {"message": "the queue\\nis full"}}', self.server.status)
            return
        chat = "chat" in self.path
        events: list[Any] = [b": ping"]
        for piece in self.server.pieces:
            choice = {"delta": {"content": piece}} if chat else {"text": piece}
            events.append(piece if isinstance(piece, dict) else {"choices": [choice]})
        events.append({"choices": [], "usage": {"completion_tokens": 3}})
        lines = [b if isinstance(b, bytes) else b"data: " + json.dumps(b).encode() for b in events]
        lines += [] if self.server.cut else [b"data: [DONE]"]
        self._answer(b"\n\n".join(lines) + b"\n\n", 200)

    def _answer(self, body: bytes, status: int) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def script() -> Iterator[Script]:
    server = Script()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_piped_lines_are_one_conversation(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "one", "", "two", "/reset", "three", "/exit", "never")
    flags = ["--system", "Be brief.", "--temperature", "0", "--seed", "7", "--max-tokens", "9"]
    assert cli.main(["chat", "--url", script.url, "--api-key", "key", *flags]) == 0
    assert capsys.readouterr().out == "Hello ✓\n" * 3
    bodies = [body for _, body, _ in script.seen]
    system = {"role": "system", "content": "Be brief."}
    assert bodies[1]["messages"] == [
        system,
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Hello ✓"},
        {"role": "user", "content": "two"},
    ]
    assert bodies[2]["messages"] == [system, {"role": "user", "content": "three"}]
    assert {key: bodies[0][key] for key in ("model", "temperature", "seed", "max_tokens")} == {
        "model": "first-model",
        "temperature": 0.0,
        "seed": 7,
        "max_tokens": 9,
    }
    assert script.seen[0][2] == "Bearer key"


def test_stats_follow_the_answer(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "one")
    assert cli.main(["chat", "--url", script.url, "--stats"]) == 0
    assert "[3 tokens, first after " in capsys.readouterr().out


def test_a_failed_answer_is_told_and_forgotten(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.status = 429
    say(monkeypatch, "one")
    assert cli.main(["chat", "--url", script.url]) == 1
    assert capsys.readouterr().err == "octavo chat: 429: the queue is full\n"


def test_interrupting_an_answer_keeps_the_program(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = OpenAIClient.stream

    def interrupted(self: OpenAIClient, path: str, body: dict[str, Any]) -> Iterator[str]:
        stream = plain(self, path, body)
        yield next(stream)
        if len(script.seen) == 1:
            raise KeyboardInterrupt
        yield from stream

    monkeypatch.setattr(OpenAIClient, "stream", interrupted)
    say(monkeypatch, "one", "two")
    assert cli.main(["chat", "--url", script.url]) == 0
    assert capsys.readouterr().out == "Hel [stopped]\nHello ✓\n"
    assert script.seen[1][1]["messages"][1] == {"role": "assistant", "content": "Hel"}


@pytest.mark.parametrize("piped", [True, False])
def test_complete_streams_the_continuation(
    script: Script, piped: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "from a pipe")
    argument = [] if piped else ["from an argument"]
    assert cli.main(["complete", *argument, "--url", f"{script.url}/v1", "--model", "m"]) == 0
    assert capsys.readouterr().out == "Hello ✓\n"
    path, body, _ = script.seen[0]
    assert path == "/v1/completions"
    assert (body["model"], body["stream"]) == ("m", True)
    assert body["prompt"] == ("from a pipe\n" if piped else "from an argument")


def test_an_error_in_the_stream_and_a_cut_stream_are_errors(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.pieces = ["Hel", {"error": {"message": "engine died"}}]
    assert cli.main(["complete", "x", "--url", script.url]) == 1
    assert "engine died" in capsys.readouterr().err
    script.pieces, script.cut = ["Hel"], True
    assert cli.main(["complete", "x", "--url", script.url]) == 1
    assert "without [DONE]" in capsys.readouterr().err


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ApiError, match="no http URL"):
        OpenAIClient("ftp://x")


def test_speed_is_of_the_tokens_after_the_first() -> None:
    assert Timing(first_s=1.0, total_s=3.0, output_tokens=11).tokens_per_s == 5.0
    assert Timing(first_s=1.0, total_s=1.0, output_tokens=1).tokens_per_s == 0.0
