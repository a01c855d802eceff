"""The engine's end of the socket, which one thread alone may touch."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest
import zmq

from engine.messages import FromEngine, Log
from engine.process import Link

if TYPE_CHECKING:
    from pathlib import Path


def test_what_another_thread_sends_leaves_in_order_with_the_owners_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.pipe()
    monkeypatch.setattr("sys.stdin", os.fdopen(ours))
    with zmq.Context() as context, context.socket(zmq.PAIR) as server:
        server.bind(f"ipc://{tmp_path}/engine")
        link = Link(f"{tmp_path}/engine")
        thread = threading.Thread(target=lambda: link.send(Log(30, "a copy failed")))
        thread.start()
        thread.join()
        assert not server.poll(100), "a ZeroMQ socket is not for two threads"
        link.send(Log(20, "own"))
        received = [msgspec.msgpack.decode(server.recv(), type=FromEngine) for _ in range(2)]
        assert received == [Log(30, "a copy failed"), Log(20, "own")]
        thread = threading.Thread(target=lambda: link.send(Log(30, "another")))
        thread.start()
        thread.join()
        link.receive(wait=False)
        assert server.poll(1000), "the loop sends it before it sleeps"
        link.close()
    os.close(theirs)
