"""Real engines, forked from a real zygote: what a fork must not take along, and a request that kills them."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from engine import zygote
from engine.client import EngineProcess
from engine.config import EngineConfig
from engine.messages import Begun
from scheduler.config import SchedulerConfig
from scheduler.types import FinishReason, Request, SamplingParams
from tests.engine import poisoned_process
from tests.engine.test_building import COSTS

if TYPE_CHECKING:
    from engine.messages import SequenceOutput

SCRIPT = Path(poisoned_process.__file__)
NUM_STREAMS = 16


def test_a_fork_of_what_is_prepared_spreads_its_work_over_threads() -> None:
    """GNU OpenMP's pool does not survive a fork: an engine would hang in its first step. The tables of
    positions of a long context are large enough that torch would start one."""
    code = """
import os, signal, torch
from engine import building
from engine.config import EngineConfig
from engine.messages import Begun
prepared = building.prepare(EngineConfig(device="cpu"))
torch.arange(1 << 22).float().cos()  # as large as anything that is prepared
if os.fork() == 0:
    signal.alarm(60)
    torch.set_num_threads(2)
    torch.arange(1 << 22).float().cos()
    os._exit(0)
assert len(os.listdir("/proc/self/task")) == 1, "a thread is left behind"
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_zygote_whose_server_ended_while_it_was_imported_loads_nothing() -> None:
    code = "from engine.zygote import Zygote; Zygote(); print('loads')"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, stdin=theirs, capture_output=True, check=True).stdout == b"loads\n"
        ours.close()
        assert subprocess.run(command, stdin=theirs, capture_output=True, check=True).stdout == b""


def test_more_requests_may_begin_at_once_than_one_message_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses a message of more than 200 kB, and the engine would die of it."""
    names = tuple(f"request-{number:040}" for number in range(8192))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(zygote, "LEASH_FD", theirs.fileno())
        ours.settimeout(10)
        announcing = pool.submit(zygote.Leash().announce, names)
        heard: list[str] = []
        while len(heard) < len(names):
            heard += msgspec.msgpack.decode(ours.recv(zygote.MAX_MESSAGE_BYTES), type=Begun).request_ids
        announcing.result()
    assert tuple(heard) == names


class Streams:
    def __init__(self, client: EngineProcess, poison: int | None) -> None:
        self.client = client
        self.tokens: list[list[int]] = [[] for _ in range(NUM_STREAMS)]
        self.errors: dict[int, str] = {}
        self.left = NUM_STREAMS
        self.ended = asyncio.Event()
        for number in range(NUM_STREAMS):
            prompt = [1, 30 + number, 500, 600]
            if number == poison:
                prompt[3] = poisoned_process.POISON
            request = Request(
                request_id=f"{number}-{poison}",
                prompt_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=12, temperature=1.0, seed=number),
            )
            client.submit(request, lambda output, number=number: self.hear(number, output))

    def hear(self, number: int, output: SequenceOutput) -> None:
        self.tokens[number] += output.tokens
        if output.finish is FinishReason.ERROR:
            self.errors[number] = output.error or ""
        self.left -= output.finish is not None
        if not self.left:
            self.ended.set()


async def test_fifteen_texts_are_the_undisturbed_ones_beside_one_that_kills_engines() -> None:
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        state_folder="-",
        costs=COSTS,
        scheduler=SchedulerConfig(max_num_seqs=NUM_STREAMS),
    )
    client = EngineProcess(config, command=[sys.executable, str(SCRIPT)])
    try:
        await client.start()
        undisturbed = Streams(client, None)
        await asyncio.wait_for(undisturbed.ended.wait(), 300)
        streams = Streams(client, 5)
        await asyncio.wait_for(streams.ended.wait(), 300)
        assert streams.errors == {5: "the engine dies whenever it computes this request"}
        del streams.tokens[5], undisturbed.tokens[5]
        assert streams.tokens == undisturbed.tokens
        assert client.ready is not None
    finally:
        await client.close()
