"""A real `octavo serve` in a process of its own, on a free port, and handles on it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
READY_WITHIN_S = 60.0
PROMPT = "The history of the lighthouse begins"


class Daemon:
    """Starts at once; `wait_ready` or the context manager waits until it serves."""

    def __init__(self, *flags: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OCTAVO_")}
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--device", "cpu", *flags],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Daemon:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return self.find_line(r"listening .*url=(\S+)").group(1)

    def wait_ready(self) -> None:
        self.find_line(r" ready ")

    def find_line(self, pattern: str, within_s: float = READY_WITHIN_S) -> re.Match[str]:
        found: list[re.Match[str]] = []

        def seen() -> bool:
            found[:] = [match for line in self.lines if (match := re.search(pattern, line))]
            return bool(found)

        wait_until(seen, within_s, lambda: f"no line {pattern!r} in:\n" + "\n".join(self.lines))
        return found[0]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metrics(self) -> dict[str, float]:
        """Samples by name, summed over labels."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        totals: dict[str, float] = {}
        for line in lines:
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                bare = name.split("{")[0]
                totals[bare] = totals.get(bare, 0.0) + float(value)
        return totals

    def engine_pid(self) -> int:
        return self._child("octavo-engine")

    def zygote_pid(self) -> int:
        return self._child("octavo-zygote")

    def _child(self, name: str) -> int:
        """The one of this name; processes between them come and go."""
        found: list[int] = []

        def seen() -> bool:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            found[:] = [int(pid) for pid in children if alive(int(pid)) and name_of(int(pid)) == name]
            return len(found) == 1

        wait_until(seen, READY_WITHIN_S, lambda: f"no {name}: {found}")
        return found[0]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, within_s: float = 30.0) -> int:
        status = self.process.wait(within_s)
        self._reader.join(5)
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))


def stream_text(
    daemon: Daemon, on_chunk: Callable[[int], object] = lambda count: None, **body: Any
) -> tuple[str, list[dict[str, Any]]]:
    """The text of a streamed completion and its chunks; `on_chunk(n)` after the n-th."""
    pieces: list[str] = []
    chunks: list[dict[str, Any]] = []
    asked = {"prompt": PROMPT, "stream": True, **body}
    with daemon.client() as client, client.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            chunks.append(chunk)
            pieces += [choice["text"] for choice in chunk["choices"]]
            on_chunk(len(chunks))
    return "".join(pieces), chunks


def wait_until(seen: Callable[[], bool], within_s: float, complaint: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + within_s
    while not seen():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.02)


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
