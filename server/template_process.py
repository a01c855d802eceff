"""The server's end of the process that renders chat templates: started on demand, replaced when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_WORKER = Path(__file__).with_name("template_worker.py")
_MAX_MEMORY_BYTES = 2**30
_MAX_WAIT_S = 30.0  # for the renderings of other requests
# How a worker ends that meets its own bound of memory where it cannot say so: by an error while it
# writes, or by a crash of C code. SIGKILL and its like come from somebody else.
_OUT_OF_MEMORY = (1, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)
# The worker sees nothing of the server's environment but what Python needs to start: it holds secrets.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "LANG", "LC_ALL", "TZ")


class TemplateError(Exception):
    """A template that cannot be compiled or rendered, or that went beyond its bounds. One line."""


class TemplateUnavailable(Exception):
    """No rendering now, and neither the template nor the request is at fault. One line."""


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    max_chars: int = 4 * 2**20  # of the rendered text
    timeout_s: float = 1.0  # of one rendering


class TemplateProcess:
    """Renders `source`, one rendering at a time; may be called from any thread."""

    def __init__(self, source: str, limits: TemplateLimits) -> None:
        self._setup = {
            "source": source,
            "max_chars": limits.max_chars,
            "timeout_s": limits.timeout_s,
            "max_memory_bytes": _MAX_MEMORY_BYTES,
        }
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False  # the worker's answer to the template has been read

    def start(self) -> None:
        """Start the worker without waiting for it, so that the first rendering need not."""
        with self._lock, contextlib.suppress(TemplateUnavailable):  # a rendering will try again
            self._start()

    def check(self) -> None:
        """Wait until the worker has compiled the template. Raises TemplateError or TemplateUnavailable."""
        with self._turn():
            pass

    def render(self, given: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
        """The text. `extra` must not name what `given` or Jinja defines. Raises as `check` does."""
        return str(self._ask({"given": dict(given), "extra": dict(extra)}))

    def traits(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """What the template can show: see `template_worker.traits`. Raises as `check` does."""
        found: dict[str, Any] = self._ask({"try_with": dict(variables)})
        return found

    def _ask(self, job: dict[str, Any]) -> Any:
        try:
            frame = _framed(job)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the variables are not JSON: {error}") from error
        with self._turn():
            self._send(frame)
            return self._result()

    def close(self) -> None:
        """End the worker. A later rendering starts another."""
        with self._lock:
            self._stop()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Have the worker to oneself. The time that Python needs to start is not the template's."""
        if not self._lock.acquire(timeout=_MAX_WAIT_S):
            raise TemplateUnavailable("too many renderings are waiting")
        try:
            self._start()
            if not self._ready:
                self._result()
                self._ready = True
            yield
        finally:
            self._lock.release()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        try:
            self._process = subprocess.Popen(
                # -P: the worker's folder is full of names that would hide the standard library's
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
        except OSError as error:
            raise TemplateUnavailable(f"its process cannot be started: {error}") from error
        self._ready = False
        self._send(_framed(self._setup))

    def _send(self, frame: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frame)
            self._process.stdin.flush()
        except OSError:
            raise self._dead() from None

    def _result(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        answer = self._receive(self._process.stdout)
        if "error" in answer:
            if not self._ready:
                self._stop()
            raise TemplateError(answer["error"])
        return answer["result"]

    def _receive(self, stream: IO[bytes]) -> Any:
        head = stream.read(4)
        if len(head) < 4:
            raise self._dead()
        (length,) = struct.unpack("<I", head)
        if length > 12 * self._limits.max_chars + 2**16:  # JSON writes a character in up to 12 bytes
            self._stop()
            raise TemplateError("its process wrote more than it may")
        raw = stream.read(length)
        if len(raw) < length:
            raise self._dead()
        return json.loads(raw)

    def _dead(self) -> TemplateError | TemplateUnavailable:
        status = self._stop()
        if status == -signal.SIGALRM:
            return TemplateError(f"it takes longer than {self._limits.timeout_s:g} s")
        if status in _OUT_OF_MEMORY and self._ready:
            return TemplateError("it needs too much memory")
        return TemplateUnavailable(f"its process ended with status {status}")

    def _stop(self) -> int | None:
        """Close the pipes, which ends an idle worker, and make sure that it is gone."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # it has died with a message half written
            process.stdin.close()
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
        return process.wait()


def _framed(message: Any) -> bytes:
    raw = json.dumps(message).encode()
    return struct.pack("<I", len(raw)) + raw
