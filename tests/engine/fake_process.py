"""An engine process that computes nothing: it speaks the messages, and dies as it is told.

    python fake_process.py SOCKET_PATH CONFIG_JSON LOG_LEVEL

The configuration's `model` is the plan of its life, one word per process, e.g. "fail", "hang", or
"serve:3,die:2": behave so in the first process, the second, ... A file counts the processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

import msgspec
import zmq

from engine.config import EngineConfig
from engine.messages import (
    Abort,
    Begun,
    Failed,
    FromEngine,
    Inspect,
    Inspected,
    Ready,
    SequenceOutput,
    StepOutput,
    Stop,
    Submit,
    ToEngine,
)
from scheduler.plan import SchedulerStats
from scheduler.snapshot import Snapshot
from scheduler.types import FinishReason


def main(path: str, config_json: str) -> None:
    count_file, _, plan = msgspec.json.decode(config_json, type=EngineConfig).model.partition("|")
    number = Path(count_file).stat().st_size
    with open(count_file, "a") as file:
        file.write(".")
    word, _, argument = plan.split(",")[min(number, plan.count(","))].partition(":")
    socket = zmq.Context().socket(zmq.PAIR)
    socket.connect(f"ipc://{path}")

    def send(message: FromEngine) -> None:
        socket.send(msgspec.msgpack.encode(message))

    if word == "fail":
        send(Failed("no such model"))
        socket.close()
        socket.context.term()  # waits until it was sent
        sys.exit(1)
    if word == "exit":
        os._exit(7)
    if word == "signal":
        os.kill(os.getpid(), int(argument))
    if word == "hang":
        time.sleep(60)
    send(Ready(100, 50, 16, 10, 1, "float32", "cpu", ()))
    if word == "garbage":
        socket.send(b"\xc1 not a message")
    if word == "crash":  # before it can say of whom
        while not isinstance(msgspec.msgpack.decode(socket.recv(), type=ToEngine), Submit):
            pass
        os._exit(9)
    serve(socket, send, die_after=int(argument) if word == "die" else None, silent=word == "silent")


def serve(socket, send, die_after, silent) -> None:
    """Token k of choice i is 10 * i + k; one token per choice and message."""
    decoder = msgspec.msgpack.Decoder(ToEngine)
    sent = 0
    later: deque[ToEngine] = deque()
    while True:
        message = later.popleft() if later else decoder.decode(socket.recv())
        if isinstance(message, Stop):
            return
        if isinstance(message, Inspect):
            if die_after is not None:
                os._exit(9)
            stats = SchedulerStats(num_running=message.max_sequences)
            send(Inspected(message.number, Snapshot("fake", stats, (), (), 0, message.number)))
        if silent or not isinstance(message, Submit):
            continue
        request = message.request
        send(Begun((request.request_id,)))
        if die_after == 0:
            time.sleep(0.05)  # the socket's own thread sends; a real engine computes meanwhile
            os._exit(9)
        aborted = set()
        for place in range(request.sampling.max_tokens):
            while socket.poll(0 if place else 20):  # an abort may follow on the heels of its request
                inner = decoder.decode(socket.recv())
                if isinstance(inner, Abort):
                    aborted.add(inner.index)
                else:
                    later.append(inner)
            outputs = []
            for index in range(request.num_choices):
                before = request.delivered[index] if request.delivered else ()
                if index in aborted or place < len(before):
                    continue
                last = place == request.sampling.max_tokens - 1
                scores = ((1, -1.0, 1, ()),) if request.sampling.prompt_logprobs and index == 0 else None
                outputs.append(
                    SequenceOutput(
                        request.request_id,
                        index,
                        tokens=(10 * index + place,),
                        prompt_logprobs=scores,
                        finish=FinishReason.LENGTH if last else None,
                    )
                )
            if outputs:
                send(StepOutput(tuple(outputs), SchedulerStats()))
                sent += 1
            if sent == die_after:
                time.sleep(0.05)
                os._exit(9)


if __name__ == "__main__":
    main(*sys.argv[1:3])
