"""One engine process and the server's end of its socket, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq
import zmq.asyncio

from engine.messages import FromEngine, Stop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.messages import ToEngine

STOP_TIMEOUT_S = 5.0
LAST_WORDS_S = 1.0  # no end is seen of a connection that never was
# How long a compute thread spins for the others before it sleeps. By default libgomp spins for milliseconds:
# beside one busy neighbour on two cores a step of 0.13 s took 0.9 s, at times 4 s; with this 0.3 s.
SPIN_COUNT = "1000"


def engine_command() -> list[str]:
    """`-P`: the user's folder may hold a module of any name; ours come last, after the installed ones."""
    root = str(Path(__file__).parents[1])
    code = (
        f"import sys; sys.path.append({root!r}); "
        "from engine.process import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-P", "-c", code]


class EngineChild:
    """Needs no loop to be made, so that its imports can run beside the server's own. It listens before the
    process starts: what the process says is here however late somebody comes to hear it.

    Raises OSError or zmq.ZMQError where there is no process or no path to be had.
    """

    def __init__(self, command: Sequence[str], arguments: Sequence[str]) -> None:
        """`arguments`: those behind the socket's path."""
        with contextlib.ExitStack() as undo:
            self._folder = Path(tempfile.mkdtemp(prefix="octavo-"))  # readable by this user alone
            undo.callback(self.hide)
            self._context = zmq.asyncio.Context()
            undo.callback(self._context.term)
            self._socket = self._context.socket(zmq.PAIR)
            undo.callback(self._socket.close)
            for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
                self._socket.setsockopt(option, 0)
            self._disconnects = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            undo.callback(self._disconnects.close)
            undo.callback(self._socket.disable_monitor)  # first: without a reader an event would block
            path = self._folder / "engine.sock"
            self._socket.bind(f"ipc://{path}")
            self._process = subprocess.Popen(
                [*command, str(path), *arguments],
                stdin=subprocess.PIPE,
                env={"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ},
                start_new_session=True,  # a Ctrl-C in the terminal is for the server, which drains
            )
            self._close = undo.pop_all().close
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        # Without a high-water mark the socket takes it at once; there is nothing to await.
        self._socket.send(self._encoder.encode(message))

    async def receive(self) -> FromEngine:
        """Raises msgspec.DecodeError for what is no message."""
        return self._decoder.decode(await self._socket.recv())

    async def all_received(self) -> None:
        """Once the process has ended: wait until another task, which receives, has had all that it sent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._disconnects.recv_multipart()
        # All of it is here, but nothing tells when the other task has had it. Not poll(): it would take the
        # wake-up that the other task waits for, which get() passes on.
        while int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    def ended(self) -> asyncio.Future[int]:
        """-> the exit status, when the process has one. A thread waits for it, since no poll may."""
        loop = asyncio.get_running_loop()
        status: asyncio.Future[int] = loop.create_future()

        def resolve(exit_status: int) -> None:
            if not status.done():
                status.set_result(exit_status)

        def wait() -> None:
            exit_status = self._process.wait()
            with contextlib.suppress(RuntimeError):  # the loop was closed first
                loop.call_soon_threadsafe(resolve, exit_status)

        threading.Thread(target=wait, name="engine-watch", daemon=True).start()
        return status

    def hide(self) -> None:
        """Both ends are connected: the path has served."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def stop(self) -> None:
        """Ask it to end, and after a while see to it."""
        self.send(Stop())
        self._close_stdin()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
        finally:  # who awaits this may be cancelled
            self.end()

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """The process ends now, whatever it does, and nothing is left behind."""
        self.kill()
        self._process.wait()
        self._close_stdin()
        self._close()

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
