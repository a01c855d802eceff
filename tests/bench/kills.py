"""Streams while the engine is killed again and again: are they the undisturbed ones, how long are the pauses?

python -m tests.bench.kills [--streams 16] [--every 3] [--seconds 60] [--zygote]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.e2e.daemon import Daemon, stream_text

if TYPE_CHECKING:
    from concurrent.futures import Future

PROMPT = "The keeper of the lighthouse number {number} wrote in the log"


@dataclass(frozen=True)
class Killed:
    texts: list[str]
    undisturbed: list[str]
    num_kills: int
    num_restarts: int
    pauses_s: list[float]  # from each kill to the next token of any stream


def kill_again_and_again(
    daemon: Daemon,
    num_streams: int,
    every_s: float,
    for_s: float,
    max_tokens: int,
    *,
    zygote_too: bool = False,
    max_kills: int = 10**6,
) -> Killed:
    """Ask for the same texts with and without kills. They go on until the last stream has ended."""
    news: list[float] = []

    def ask(number: int) -> str:
        text, _ = stream_text(
            daemon,
            lambda _: news.append(time.monotonic()),
            prompt=PROMPT.format(number=number),
            max_tokens=max_tokens,
            temperature=1.0,
            seed=number,
            ignore_eos=True,
        )
        return text

    with ThreadPoolExecutor(num_streams) as pool:
        undisturbed = list(pool.map(ask, range(num_streams)))
        streams = [pool.submit(ask, number) for number in range(num_streams)]
        killed_s = _kill(daemon, streams, every_s, time.monotonic() + for_s, max_kills, zygote_too)
        texts = [stream.result() for stream in streams]
    pauses_s = [min((seen for seen in news if seen > at), default=at) - at for at in killed_s]
    num_restarts = int(daemon.metrics()["octavo:engine_restarts_total"])
    return Killed(texts, undisturbed, len(killed_s), num_restarts, pauses_s)


def _kill(
    daemon: Daemon,
    streams: list[Future[str]],
    every_s: float,
    ends_s: float,
    max_kills: int,
    zygote_too: bool,
) -> list[float]:
    """-> when"""
    killed_s: list[float] = []
    while time.monotonic() < ends_s and len(killed_s) < max_kills:
        time.sleep(every_s)
        if all(stream.done() for stream in streams):
            break
        victims = [daemon.engine_pid(), *([daemon.zygote_pid()] if zygote_too else [])]
        killed_s.append(time.monotonic())
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
    return killed_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between kills")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--tokens", type=int, default=600, help="of each stream")
    parser.add_argument("--zygote", action="store_true", help="kill what engines are forked from, too")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with Daemon("--dtype", options.dtype) as daemon:
        done = kill_again_and_again(
            daemon,
            options.streams,
            options.every,
            options.seconds,
            options.tokens,
            zygote_too=options.zygote,
        )
    equal = sum(text == wanted for text, wanted in zip(done.texts, done.undisturbed, strict=True))
    print(f"{equal} of {options.streams} texts are equal after {done.num_kills} kills")
    if done.pauses_s:
        print(
            f"from a kill to the next token: median {statistics.median(done.pauses_s):.2f} s, "
            f"longest {max(done.pauses_s):.2f} s"
        )


if __name__ == "__main__":
    main()
