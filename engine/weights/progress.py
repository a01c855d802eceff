"""How far a long load is: on a terminal, and for whoever waits for its end."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engine.messages import Loading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_QUIET_S = 0.5  # shorter loads show nothing, and do not pay for importing the bar
_TELL_EVERY_S = 1.0

listener: Callable[[Loading], None] | None = None  # of this process


@contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields what to call with the number of bytes done since. Draws only where stderr is a terminal."""
    bar: Any = None
    task: Any = None
    done_bytes, started = 0, time.perf_counter()
    told = started

    def advance(num_bytes: int) -> None:
        nonlocal bar, task, done_bytes, told
        done_bytes += num_bytes
        if listener is not None and time.perf_counter() - told > _TELL_EVERY_S:
            told = time.perf_counter()
            listener(Loading(done_bytes, total_bytes))
        if bar is None and time.perf_counter() - started > _QUIET_S and sys.stderr.isatty():
            bar = _bar()
            task = bar.add_task(title, total=total_bytes)
            bar.start()
        if bar is not None:
            bar.update(task, completed=done_bytes)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
