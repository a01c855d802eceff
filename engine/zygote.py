"""The process that engines are forked from. It has done what takes long and is the same for each of them, so
the next one computes within a fraction of a second; what they share of its memory is there once.

    server ── control ──> zygote     a path of a socket and one end of a leash, for each engine it shall fork
       └───── leash ────> engine     its standard input: when it closes, the server is gone, or wants no more
                                     of it; the other way goes what must be heard even if the engine dies in
                                     the next instant

An engine becomes the server's own child: a process between it and the zygote ends at once, and the server has
said that it adopts orphans. So the server learns how each engine ended, whether or not there still is a
zygote, and the zygote's end harms no engine. Both are killed with the server.

A fork takes along one thread, and whatever others held or waited for stays as it was: until it forks, a
zygote must leave no thread behind, and may touch neither ZeroMQ nor CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Final

import msgspec

from engine.messages import Begun, FromZygote, OnLeash, Started

CONTROL_FD: Final = 0
LEASH_FD: Final = 0
MAX_MESSAGE_BYTES: Final = 1 << 18  # on either; more than a Unix socket takes at once
_IDS_TOGETHER: Final = 500  # of requests, in one message
_ADOPTION_POLL_S: Final = 0.0005
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36

Engine = Callable[[str, "Leash"], int]  # (path of the server's socket, leash) -> exit status


class Zygote:
    """Its own end of the control socket."""

    def __init__(self) -> None:
        set_name("octavo-zygote")
        _die_with_parent()
        self._control = socket.socket(fileno=os.dup(CONTROL_FD))
        self._encoder = msgspec.msgpack.Encoder()
        with contextlib.suppress(BlockingIOError):
            if not self._control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                sys.exit()  # the server was gone before its end could be this process's

    def send(self, message: FromZygote) -> None:
        """To the server. Lost when it is gone."""
        with contextlib.suppress(OSError):
            self._control.send(self._encoder.encode(message))

    def serve(self, engine: Engine) -> int:
        """Fork an engine whenever the server asks for one, until it is gone. -> exit status"""
        while True:
            path, leashes, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
            if not leashes:
                return 0
            self._fork(path.decode(), leashes[0], engine)

    def _fork(self, path: str, leash: int, engine: Engine) -> None:
        """Raises OSError where there can be no further process."""
        between = os.fork()
        if between:
            _, status = os.waitpid(between, 0)
            os.close(leash)  # not before: who sees it closed on all sides may reap the engine
            if os.waitstatus_to_exitcode(status) > 0:  # else somebody has killed it
                raise OSError("no process can be forked")
            return
        status = 1
        try:
            between = os.getpid()
            pid = os.fork()
            self._control.close()
            os.dup2(leash, LEASH_FD)
            os.close(leash)
            if pid:
                Leash().send(Started(pid))  # for one that is killed at birth
                status = 0
            else:
                status = _live(path, between, engine)
        except BaseException:
            traceback.print_exc()
        finally:
            # Not by sys.exit(): what waits for that was set up by the zygote, for itself.
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(status)


class Leash:
    """The engine's end. What is sent here is the kernel's at once: it is heard whatever happens next."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=os.dup(LEASH_FD))
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: OnLeash) -> None:
        """Raises OSError when the server is gone."""
        self._socket.send(self._encoder.encode(message))

    def announce(self, request_ids: tuple[str, ...]) -> None:
        """Something of them is about to be computed for the first time."""
        for first in range(0, len(request_ids), _IDS_TOGETHER):
            self.send(Begun(request_ids[first : first + _IDS_TOGETHER]))


def _live(path: str, between: int, engine: Engine) -> int:
    """In the engine's process, from its first instant. -> exit status"""
    set_name("octavo-engine")
    while os.getppid() == between:
        time.sleep(_ADOPTION_POLL_S)
    _die_with_parent()
    leash = Leash()
    leash.send(Started(os.getpid()))
    return engine(path, leash)


def adopt_orphans() -> bool:
    """Whoever loses its parent below this process becomes its child. -> whether the system can do that"""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1) == 0


def set_name(name: str) -> None:
    """What `ps` and `top` show, and /proc/PID/comm; at most 15 bytes."""
    _prctl(_PR_SET_NAME, name.encode())


def _die_with_parent() -> None:
    """Also when it is stopped, or hangs in something that no closed socket ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int | bytes) -> int:
    """-1 where the system does not know it."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return -1 if prctl is None else int(prctl(option, value, 0, 0, 0))
