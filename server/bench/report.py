"""What a measurement prints and writes: a table for people, JSON with every raw figure."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.bench.summary import Spread, Summary, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from server.bench.client import Outcome
    from server.bench.workloads import Workload

MAX_SHOWN_ERRORS = 5
MIN_TABLE_WIDTH = 100  # columns; a narrower terminal wraps the rows, which reads better than cut figures


@dataclass(frozen=True, slots=True)
class Measured:
    """One workload that has run."""

    workload: Workload
    outcomes: Sequence[Outcome]

    @property
    def summary(self) -> Summary:
        return summarise(self.outcomes)


def print_table(console: Console, results: Sequence[Measured]) -> None:
    """One row per workload; below it completion times by kind of request, and what went wrong."""
    from rich.table import Table

    table = Table(caption="TTFT, ITL: p50 / p99 in ms; completion: p50 / p99 in s", caption_justify="left")
    for heading in ("workload", "req/s", "out tok/s", "TTFT", "ITL", "completion", "errors"):
        table.add_column(heading, justify="left" if heading == "workload" else "right", no_wrap=True)
    for result in results:
        summary = result.summary
        table.add_row(
            result.workload.name,
            f"{summary.requests_per_s:.3f}",
            f"{summary.output_tokens_per_s:.1f}",
            _pair(summary.ttft_s, 1000, 0),
            _pair(summary.itl_s, 1000, 1),
            _pair(summary.completion_s, 1, 2),
            f"{summary.num_errors} of {summary.num_requests}" if summary.num_errors else "0",
        )
    console.width = max(console.width, MIN_TABLE_WIDTH)
    console.print(table)
    for result in results:
        _print_details(console, result.workload, result.summary)


def _print_details(console: Console, workload: Workload, summary: Summary) -> None:
    cached = f", {summary.cached_tokens:,} of them cached" if summary.cached_tokens else ""
    tokens = f"{summary.prompt_tokens:,} tokens in{cached}, {summary.output_tokens:,} out"
    say(console, f"{workload.name}: {workload.about}; {tokens} in {summary.duration_s:.1f} s")
    for label, spread in summary.completion_by_label_s.items():
        say(console, f"   {label}: completion mean {spread.mean:.3f} s, p99 {spread.p99:.3f} s")
    for message, count in list(summary.errors.items())[:MAX_SHOWN_ERRORS]:
        say(console, f"   {count} x {message}")


def say(console: Console, text: str) -> None:
    """A plain line: what a server sent is never read as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _pair(spread: Spread, scale: float, digits: int) -> str:
    if math.isnan(spread.p50):
        return "-"
    return f"{spread.p50 * scale:.{digits}f} / {spread.p99 * scale:.{digits}f}"


def as_json(results: Sequence[Measured], **about: Any) -> dict[str, Any]:
    """Everything that someone needs who wants to repeat or recompute the figures."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "command": shlex.join(_without_key(["octavo", *sys.argv[1:]])),
        **about,
        "workloads": [_result(result) for result in results],
    }


def _without_key(command: Sequence[str]) -> list[str]:
    """The command line as it may be shown to others."""
    shown = [re.sub("^--api-key=.*", "--api-key=<hidden>", word) for word in command]
    return [
        "<hidden>" if before == "--api-key" else word
        for before, word in zip(["", *shown], shown, strict=False)
    ]


def _result(result: Measured) -> dict[str, Any]:
    begin_s = min(outcome.start_s for outcome in result.outcomes)
    return {
        "name": result.workload.name,
        "about": result.workload.about,
        "concurrency": result.workload.concurrency,
        "summary": without_nan(asdict(result.summary)),
        "requests": [_request(outcome, begin_s) for outcome in result.outcomes],
    }


def _request(outcome: Outcome, begin_s: float) -> dict[str, Any]:
    return {
        "label": outcome.job.label,
        "asked_input_tokens": outcome.job.input_tokens,
        "asked_output_tokens": outcome.job.output_tokens,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "output_tokens": outcome.output_tokens,
        "start_s": round(outcome.start_s - begin_s, 6),
        "ttft_s": None if outcome.ttft_s is None else round(outcome.ttft_s, 6),
        "completion_s": round(outcome.completion_s, 6),
        "gaps_ms": [round(gap_s * 1000, 3) for gap_s in outcome.gaps_s],
        "error": outcome.error or None,
    }


def without_nan(value: Any) -> Any:
    """JSON has no NaN; null says the same: there was nothing to measure."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def machine() -> dict[str, Any]:
    """The machine that the client runs on."""
    return {
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _proc_field("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _proc_field(path: str, name: str) -> str:
    """One `name : value` line of a Linux proc file; empty elsewhere."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
