"""The engine process: one ZeroMQ socket in and out, one loop that computes. It is forked from a zygote.

    python -m engine.process CONFIG_JSON LOG_LEVEL      the zygote, which `engine.child` starts and talks to

An engine ends when told to (`Stop`), or when its standard input closes, which is how it learns that the
server is gone, however that happened. It sleeps on the socket when there is nothing to compute.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

_started = time.perf_counter()

import msgspec  # noqa: E402
import zmq  # noqa: E402

from engine.config import EngineConfig  # noqa: E402
from engine.messages import (  # noqa: E402
    Failed,
    FromEngine,
    Inspect,
    Inspected,
    Log,
    LongStep,
    Phase,
    Stop,
    ToEngine,
)
from engine.weights import progress  # noqa: E402
from engine.zygote import Leash, Zygote  # noqa: E402
from scheduler.snapshot import take_snapshot  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.building import Prepared

_SEND_LINGER_MS = 1000
GC_THRESHOLD = 50_000  # values made, net, from which young ones are collected

logger = logging.getLogger("octavo.engine")


class Link:
    """The engine's end of the socket. A ZeroMQ socket is for one thread: for the one that made this."""

    def __init__(self, path: str) -> None:
        self.context = zmq.Context(io_threads=1)
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, _SEND_LINGER_MS)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the requests in flight; a stall must not block
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.connect(f"ipc://{path}")
        self.poller = zmq.Poller()
        self.poller.register(self.socket, zmq.POLLIN)
        self.poller.register(sys.stdin.fileno(), zmq.POLLIN)
        self._owner = threading.get_ident()
        self._from_others: deque[FromEngine] = deque()
        self.encoder = msgspec.msgpack.Encoder()
        self.decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        """What another thread sends (log lines, of copies above all) leaves with the owner's next call."""
        self._from_others.append(message)
        if threading.get_ident() == self._owner:
            self._send_all()

    def _send_all(self) -> None:
        while self._from_others:
            self.socket.send(self.encoder.encode(self._from_others.popleft()))

    def wake_on(self, news: int) -> None:
        """Waiting ends as well when this file descriptor becomes readable."""
        self.poller.register(news, zmq.POLLIN)

    def receive(self, wait: bool) -> list[ToEngine]:
        """Everything that has arrived; with `wait`, sleeps until something does, or there is other news."""
        self._send_all()
        events = dict(self.poller.poll(None if wait else 0))
        messages: list[ToEngine] = []
        if self.socket in events:
            while self.socket.poll(0):
                messages.append(self.decoder.decode(self.socket.recv()))
        if sys.stdin.fileno() in events and not os.read(sys.stdin.fileno(), 1024):
            messages.append(Stop())
        return messages

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class LogToServer(logging.Handler):
    def __init__(self, send: Callable[[Log], None]) -> None:
        super().__init__()
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        self.send(Log(record.levelno, self.format(record)))


def prepare(config: EngineConfig) -> Prepared | Failed:
    """In the zygote: what every engine has in common, or why there can be none."""
    from engine.building import prepare
    from engine.sizing import EngineConfigError
    from engine.weights.errors import CheckpointError

    imported = Phase("import torch", time.perf_counter() - _started)
    try:
        prepared = prepare(config, (imported,))
    except (CheckpointError, EngineConfigError) as error:
        return Failed(str(error))
    except Exception as error:
        return _unexpected(error)
    _freeze()
    return prepared


def run(link: Link, leash: Leash, config: EngineConfig, prepared: Prepared) -> int:
    """Build, report ready, then step until told to stop. -> exit status"""
    from engine.building import build_engine
    from engine.sizing import EngineConfigError
    from engine.weights.errors import CheckpointError

    try:
        engine = build_engine(config, prepared)
    except (CheckpointError, EngineConfigError) as error:
        link.send(Failed(str(error)))
        return 1
    _freeze()
    # Steps make thousands of values and hardly any cycles: young collections pay for nothing.
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    link.send(engine.ready)
    core = engine.core
    core.on_begun = leash.announce
    core.on_long_step = lambda seconds: link.send(LongStep(seconds))
    if core.copier is not None:
        link.wake_on(core.copier.fileno())
    while True:
        for message in link.receive(wait=not core.can_step):
            if isinstance(message, Stop):
                engine.lengths.save()
                core.close()
                return 0
            if isinstance(message, Inspect):
                link.send(Inspected(message.number, take_snapshot(core.scheduler, message.max_sequences)))
            else:
                core.handle(message)
        if core.can_step:
            link.send(core.step())
        engine.lengths.save_when_due()


def _freeze() -> None:
    """What lives as long as the process is never garbage: a full collection over it pauses a step by 75 ms,
    and in a fork makes copies of the memory that it shares."""
    gc.collect()
    gc.freeze()


def _unexpected(error: Exception) -> Failed:
    logger.exception("the engine stopped")
    return Failed(f"the engine stopped: {type(error).__name__}: {error}".splitlines()[0])


def live(path: str, leash: Leash, config: EngineConfig, prepared: Prepared | Failed) -> int:
    """In the engine, which was just forked. -> exit status"""
    link = Link(path)
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, LogToServer)
    handler.send = progress.listener = link.send
    try:
        if isinstance(prepared, Failed):
            link.send(prepared)
            return 1
        return run(link, leash, config, prepared)
    except Exception as error:
        link.send(_unexpected(error))
        return 1
    finally:
        link.close()


def main(arguments: list[str]) -> int:
    config_json, log_level = arguments
    config = msgspec.json.decode(config_json, type=EngineConfig)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's; it drains and says stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    zygote = Zygote()
    logging.basicConfig(level=log_level.upper(), handlers=[LogToServer(zygote.send)], format="%(message)s")
    progress.listener = zygote.send
    prepared = prepare(config)
    return zygote.serve(lambda path, leash: live(path, leash, config, prepared))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
