"""Drafting while the target verifies (PEARL, Liu 2024, arXiv 2408.11850): a thread beside the engine's own.

It works only while the target computes a step. So whatever drafters and sequences keep is touched by one
thread at a time, except for what both only read: weights, tokens, what requests ask of their logits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from concurrent.futures import Future


def overlap_threads(choice: str, device: torch.device, num_cores: int, num_threads: int) -> int:
    """`choice`: auto, on or off -> CPU threads for drafting while the target computes with `num_threads` of
    its own; 0: nobody drafts then."""
    if choice == "off":
        return 0
    if device.type != "cpu":
        return 1  # it only launches
    left = num_cores - num_threads
    return max(left, 1) if choice == "on" else max(left, 0)


class Overlap:
    """`num_threads`: for its arithmetic. That number is each thread's own in OpenMP, as is the team that it
    leads; so the target keeps what it has."""

    def __init__(self, num_threads: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._enough = Event()
        self._running: Future[dict[str, Exception]] | None = None
        self._pool = ThreadPoolExecutor(
            1, "octavo-drafts", initializer=torch.set_num_threads, initargs=(num_threads,)
        )

    def start(self, drafting: Mapping[str, Iterator[None]]) -> None:
        """Have drafters, by name, take pass after pass, until there are none or `stop` is called."""
        assert self._running is None, "drafting ahead was not stopped"
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # which filled the drafters' KV
        self._enough.clear()
        self._running = self._pool.submit(self._run, drafting)

    def stop(self) -> dict[str, Exception]:
        """When the pass that is being computed is done. -> drafters that failed"""
        if self._running is None:
            return {}
        running, self._running = self._running, None
        self._enough.set()
        failures = running.result()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return failures

    def close(self) -> None:
        """The thread ends."""
        self.stop()
        self._pool.shutdown()

    def _run(self, drafting: Mapping[str, Iterator[None]]) -> dict[str, Exception]:
        failures: dict[str, Exception] = {}
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for name, passes in drafting.items():
                try:
                    while not self._enough.is_set() and next(passes, self) is not self:
                        pass
                except Exception as failure:
                    failures[name] = failure
        return failures
