"""A recorded trace of arrivals as a workload; `scheduler.replay.trace` says which formats are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.replay.trace import TraceError
from scheduler.replay.trace import read_trace as read_recorded
from server.bench.workloads import Job, Workload

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TraceError", "read_trace"]


def read_trace(
    path: Path,
    *,
    time_scale: float = 1.0,
    max_input: int | None = None,
    max_output: int | None = None,
    num_requests: int | None = None,
) -> Workload:
    """The first `num_requests` rows: arrivals from 0 on, multiplied by `time_scale`; lengths clipped.
    Raises TraceError."""
    jobs = tuple(
        Job(_clip(row.prompt_len, max_input), _clip(row.output_len, max_output), row.arrival_s * time_scale)
        for row in read_recorded(path, num_requests).requests
    )
    about = f"{path.name}, {len(jobs)} requests, times x {time_scale:g}"
    about += f", input <= {max_input}" if max_input else ""
    about += f", output <= {max_output}" if max_output else ""
    return Workload("trace", about, jobs, concurrency=None)


def _clip(tokens: int, limit: int | None) -> int:
    return min(tokens, limit or tokens)
