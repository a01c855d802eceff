"""An engine process that computes nothing: it speaks the messages, and dies as it is told. Forked like a real
one.

    python fake_process.py CONFIG_JSON LOG_LEVEL

The configuration's `model` is the plan of the engines' lives, one word per process, e.g. "fail", "hang", or
"serve,die:2": behave so in the first process, the second, ... A file counts the processes. A number behind
the word says after how many outputs it dies, one more how many requests it computes at a time.

The first token of a prompt says what computing it does to whatever process does so.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

import msgspec
import zmq

from engine import zygote as zygote_module
from engine.config import EngineConfig
from engine.messages import (
    Abort,
    Failed,
    FromEngine,
    Inspect,
    Inspected,
    Loading,
    Log,
    LongStep,
    Ready,
    SequenceOutput,
    StepOutput,
    Stop,
    Submit,
    ToEngine,
)
from engine.zygote import Leash, Zygote
from scheduler.plan import SchedulerStats
from scheduler.snapshot import Snapshot
from scheduler.types import FinishReason, Request

HARMLESS, POISON, CRASH, HANG, SLOW = range(5)
SLOW_S = 0.8  # the first step of a slow one; the second token of its prompt: predicted, in milliseconds
WIDE = 1000


def main(config_json: str) -> int:
    count_file, _, plan = msgspec.json.decode(config_json, type=EngineConfig).model.partition("|")
    zygote = Zygote()
    if plan.startswith("load"):
        for part in range(8):
            zygote.send(Loading(part, 8))
            zygote.send(Log(20, f"loading {part}"))
            time.sleep(0.1)
    if plan.startswith("zygote-exits"):
        os._exit(11)
    if "stillborn" in plan:
        begin = zygote_module._live

        def die_at_birth(path: str, between: int, engine: zygote_module.Engine) -> int:
            number = Path(count_file).stat().st_size
            if plan.split(",")[min(number, plan.count(","))] == "stillborn":
                with Path(count_file).open("a") as file:
                    file.write(".")
                os.kill(os.getpid(), signal.SIGKILL)
            return begin(path, between, engine)

        zygote_module._live = die_at_birth
    return zygote.serve(lambda path, leash: live(path, leash, Path(count_file), plan))


def live(path: str, leash: Leash, count_file: Path, plan: str) -> int:
    number = count_file.stat().st_size
    with count_file.open("a") as file:
        file.write(".")
    word, *numbers = plan.split(",")[min(number, plan.count(","))].split(":")
    socket = zmq.Context().socket(zmq.PAIR)
    socket.connect(f"ipc://{path}")

    def send(message: FromEngine) -> None:
        socket.send(msgspec.msgpack.encode(message))

    if word == "fail":
        send(Failed("no such model"))
        socket.close()
        socket.context.term()  # waits until it was sent
        return 1
    if word == "exit":
        os._exit(7)
    if word == "signal":
        os.kill(os.getpid(), int(numbers[0]))
    if word == "hang":
        time.sleep(60)
    send(Ready(100, 50, 16, 10, 1, "float32", "cpu", ()))
    if word == "idle-death":
        time.sleep(0.05)
        os._exit(9)
    if word == "garbage":
        socket.send(b"\xc1 not a message")
    if word == "crash":  # before it can say of whom
        while not isinstance(msgspec.msgpack.decode(socket.recv(), type=ToEngine), Submit):
            pass
        os._exit(9)
    die_after = int(numbers[0]) if word == "die" else None
    width = int(numbers[1]) if len(numbers) > 1 else WIDE
    _Fake(socket, send, leash, die_after, width, silent=word == "silent").serve()
    return 0


class _Running:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.place = 0
        self.aborted: set[int] = set()


class _Fake:
    """Token k of choice i is 10 * i + k; one token per choice and message."""

    def __init__(self, socket, send, leash, die_after, width, silent) -> None:
        self.socket, self.send, self.leash = socket, send, leash
        self.die_after, self.width, self.silent = die_after, width, silent
        self.decoder = msgspec.msgpack.Decoder(ToEngine)
        self.waiting: deque[Request] = deque()
        self.running: dict[str, _Running] = {}
        self.sent = 0

    def serve(self) -> None:
        while True:
            begins = not self.running
            if begins and not self.waiting:
                self.socket.poll()
            # What comes together is computed together; an abort may follow on the heels of its request.
            while self.socket.poll(20 if begins else 0):
                message = self.decoder.decode(self.socket.recv())
                if isinstance(message, Stop):
                    return
                self.take(message)
            if (self.waiting or self.running) and not self.silent:
                self.step()

    def take(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self.waiting.append(message.request)
        elif isinstance(message, Inspect):
            if self.die_after is not None:
                os._exit(9)
            stats = SchedulerStats(num_running=message.max_sequences)
            self.send(Inspected(message.number, Snapshot("fake", stats, (), (), 0, message.number)))
        elif isinstance(message, Abort):
            for request in [one for one in self.waiting if one.request_id == message.request_id]:
                self.waiting.remove(request)
                self.running[request.request_id] = _Running(request)
            if message.request_id in self.running:
                running = self.running[message.request_id]
                choices = range(running.request.num_choices) if message.index is None else (message.index,)
                running.aborted.update(choices)

    def step(self) -> None:
        begun = []
        while self.waiting and len(self.running) < self.width:
            request = self.waiting.popleft()
            self.running[request.request_id] = _Running(request)
            begun.append(request)
        if begun:
            self.leash.announce(tuple(request.request_id for request in begun))
        if self.die_after == 0:
            os._exit(9)
        for request in begun:
            self.compute(request)
        outputs = [output for running in list(self.running.values()) for output in self.advance(running)]
        if outputs:
            self.send(StepOutput(tuple(outputs), SchedulerStats()))
            self.sent += 1
        if self.sent == self.die_after:
            time.sleep(0.05)  # the socket's own thread sends; a real engine computes meanwhile
            os._exit(9)

    def compute(self, request: Request) -> None:
        kind, argument = (*request.prompt_ids, 0, 0)[:2]
        if kind == POISON:
            os._exit(9)
        if kind == CRASH:
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == HANG:
            time.sleep(60)
        if kind == SLOW:
            self.send(LongStep(argument / 1000))
            time.sleep(SLOW_S)

    def advance(self, running: _Running) -> list[SequenceOutput]:
        """Nothing of what was delivered is delivered again."""
        request, outputs = running.request, []
        while running.place < request.sampling.max_tokens and not outputs:
            last = running.place == request.sampling.max_tokens - 1
            for index in range(request.num_choices):
                before = request.delivered[index] if request.delivered else ()
                if index in running.aborted or running.place < len(before):
                    continue
                scores = ((1, -1.0, 1, ()),) if request.sampling.prompt_logprobs and index == 0 else None
                token = 10 * index + running.place
                finish = FinishReason.LENGTH if last else None
                outputs.append(
                    SequenceOutput(
                        request.request_id, index, tokens=(token,), prompt_logprobs=scores, finish=finish
                    )
                )
            running.place += 1
        if running.place == request.sampling.max_tokens or len(running.aborted) == request.num_choices:
            self.running.pop(request.request_id, None)
        return outputs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
