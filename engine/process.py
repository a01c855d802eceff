"""The engine process: one ZeroMQ socket in and out, one loop that computes.

    python -m engine.process SOCKET_PATH CONFIG_JSON LOG_LEVEL

It ends when told to (`Stop`), or when its standard input closes, which is how it learns that the server
is gone, however that happened. It sleeps on the socket when there is nothing to compute.
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

_started = time.perf_counter()

import msgspec  # noqa: E402
import zmq  # noqa: E402

from engine.config import EngineConfig  # noqa: E402
from engine.messages import (  # noqa: E402
    Begun,
    Failed,
    FromEngine,
    Inspect,
    Inspected,
    Log,
    Phase,
    Stop,
    ToEngine,
)
from scheduler.snapshot import take_snapshot  # noqa: E402

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
    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link = link

    def emit(self, record: logging.LogRecord) -> None:
        self.link.send(Log(record.levelno, self.format(record)))


def run(link: Link, config: EngineConfig) -> int:
    """Build, report ready, then step until told to stop. -> exit status"""
    from engine.building import build_engine
    from engine.sizing import EngineConfigError
    from engine.weights.errors import CheckpointError

    imported = Phase("import torch", time.perf_counter() - _started)
    try:
        engine = build_engine(config, (imported,))
    except (CheckpointError, EngineConfigError) as error:
        link.send(Failed(str(error)))
        return 1
    # What lives as long as the process is never garbage: a full collection over it pauses a step by 75 ms.
    gc.collect()
    gc.freeze()
    # Steps make thousands of values and hardly any cycles: young collections pay for nothing.
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    link.send(engine.ready)
    core = engine.core
    core.on_begun = lambda request_ids: link.send(Begun(request_ids))
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


def main(arguments: list[str]) -> int:
    path, config_json, log_level = arguments
    config = msgspec.json.decode(config_json, type=EngineConfig)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's; it drains and says stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = Link(path)
    logging.basicConfig(level=log_level.upper(), handlers=[LogToServer(link)], format="%(message)s")
    try:
        return run(link, config)
    except Exception as error:
        logger.exception("the engine stopped")
        link.send(Failed(f"the engine stopped: {type(error).__name__}: {error}".splitlines()[0]))
        return 1
    finally:
        link.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
