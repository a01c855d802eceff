"""The zygote and one engine process forked from it, each with the server's end of its sockets, from start to
end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq
import zmq.asyncio

from engine.messages import FromEngine, FromZygote, OnLeash, Started, Stop
from engine.zygote import MAX_MESSAGE_BYTES, adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from engine.messages import ToEngine

STOP_TIMEOUT_S = 5.0
LAST_WORDS_S = 1.0  # no end is seen of a connection that never was
ENDING_S = 1.0  # between what is seen first of a process's end and its status
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


class ZygoteChild:
    """The process that engines are forked from. Needs no loop to be made, so that its imports can run beside
    the server's own. Raises OSError where there is no process to be had."""

    def __init__(self, command: Sequence[str], arguments: Sequence[str]) -> None:
        adopt_orphans()
        self._process: subprocess.Popen[bytes]
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        try:
            self._process = subprocess.Popen(
                [*command, *arguments],
                stdin=theirs.fileno(),
                env={"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ},
                start_new_session=True,  # a Ctrl-C in the terminal is for the server, which drains
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        self._decoder: msgspec.msgpack.Decoder[FromZygote] = msgspec.msgpack.Decoder(FromZygote)
        self._loop: asyncio.AbstractEventLoop | None = None  # that watches it
        self.has_forked = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, path: str) -> socket.socket:
        """Ask for an engine on the socket at `path` -> our end of its leash, which closes when there is
        none."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs, contextlib.suppress(OSError):  # a zygote that is gone: the leash says so
            socket.send_fds(self._control, [path.encode()], [theirs.fileno()])
        return ours

    def watch(self, on_message: Callable[[FromZygote], None], on_end: Callable[[], None]) -> None:
        """From now on hear of its loading, and of its end."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._control, self._hear, on_message, on_end)

    def _hear(self, on_message: Callable[[FromZygote], None], on_end: Callable[[], None]) -> None:
        if data := _received(self._control):
            on_message(self._decoder.decode(data))
        elif data is not None:
            self._stop_watching()
            on_end()

    def _stop_watching(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._control)
        self._loop = None

    def end(self, patience_s: float = 0.0) -> int:
        """It ends, by itself within `patience_s` or now, and nothing is left behind. -> its exit status"""
        self._stop_watching()
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(patience_s)
        self._process.kill()
        return self._process.wait()


class EngineChild:
    """It listens before the process starts: what the process says is here however late somebody comes to hear
    it.

    Raises OSError or zmq.ZMQError where there is no path to be had.
    """

    def __init__(self, zygote: ZygoteChild) -> None:
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
            self._leash = zygote.fork(str(path))
            undo.callback(self._leash.close)
            self._close = undo.pop_all().close
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._on_leash: msgspec.msgpack.Decoder[OnLeash] = msgspec.msgpack.Decoder(OnLeash)
        self.pid: int | None = None  # None until the process is there
        self.was_killed = False  # by the server
        self._is_over = False
        self._status: int | None = None
        self._on_begun: Callable[[tuple[str, ...]], None] = lambda _: None
        self._loop: asyncio.AbstractEventLoop | None = None  # that watches the leash
        self._end: asyncio.Future[int | None] | None = None

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

    def ended(self, on_begun: Callable[[tuple[str, ...]], None]) -> asyncio.Future[int | None]:
        """-> the exit status, when the process has one; None when there never was one, or the system does not
        tell. On the way `on_begun` hears of whom something is about to be computed."""
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.create_future()
        self._on_begun = on_begun
        if self._is_over:
            self._end.set_result(self._status)
        else:
            self._loop.add_reader(self._leash, self._hear)
        return self._end

    def _hear(self) -> None:
        """One message of the leash, or its end."""
        data = _received(self._leash)
        if not data:
            if data is not None:
                self._reap()
            return
        message = self._on_leash.decode(data)
        if isinstance(message, Started):
            self.pid = message.pid
        else:
            self._on_begun(message.request_ids)

    def hide(self) -> None:
        """Both ends are connected: the path has served."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def stop(self) -> None:
        """Ask it to end, and after a while see to it."""
        self.send(Stop())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self.ended(lambda _: None)
        finally:  # who awaits this may be cancelled
            self.end()

    def kill(self) -> None:
        if self.pid is not None and not self._is_over:
            self.was_killed = True
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """The process ends now, whatever it does, and nothing is left behind. Where it is not known yet,
        there must be no zygote any more."""
        if self.pid is None and not self._is_over:  # it may have been forked all the same
            self._leash.settimeout(ENDING_S)
            self._hear()
        self.kill()
        self._reap()
        self._close()

    def _reap(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self.pid is not None:
            with contextlib.suppress(ChildProcessError):  # the system does not let orphans be adopted
                self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._leash)
        if self._end is not None and not self._end.done():
            self._end.set_result(self._status)


def _received(ours: socket.socket) -> bytes | None:
    """One message; an empty one when the other end is closed, None when there is none yet."""
    try:
        return ours.recv(MAX_MESSAGE_BYTES)
    except (BlockingIOError, TimeoutError):
        return None
    except ConnectionError:  # it was closed before it had read everything
        return b""
