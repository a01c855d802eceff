"""Traces of real arrivals: arrival time, input length, output length.

Three formats are told apart by what their first line names:
- Azure LLM inference (csv): TIMESTAMP (UTC), ContextTokens, GeneratedTokens
- ServeGen-derived (csv): arrived_at (s), num_prefill_tokens, num_decode_tokens
- Mooncake (jsonl): timestamp (ms), input_length, output_length
"""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING

from server.bench.workloads import Job, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


class TraceError(Exception):
    """The file is not a trace. The text names the file and, where there is one, the line."""


def read_trace(
    path: Path,
    *,
    time_scale: float = 1.0,
    max_input: int | None = None,
    max_output: int | None = None,
    num_requests: int | None = None,
) -> Workload:
    """The first `num_requests` rows: arrivals from 0 on, multiplied by `time_scale`; lengths clipped."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(islice(_rows(path, lines), num_requests))
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from None
    if not rows:
        raise TraceError(f"{path} has no requests")
    first_s = rows[0][0]
    jobs = tuple(
        Job(_clip(tokens_in, max_input), _clip(tokens_out, max_output), (at_s - first_s) * time_scale)
        for at_s, tokens_in, tokens_out in rows
    )
    about = f"{path.name}, {len(jobs)} requests, times x {time_scale:g}"
    about += f", input <= {max_input}" if max_input else ""
    about += f", output <= {max_output}" if max_output else ""
    return Workload("trace", about, jobs, concurrency=None)


def _clip(tokens: int, limit: int | None) -> int:
    """At least one: a request without input or output is no request."""
    return max(1, min(tokens, limit or tokens))


def _rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[float, int, int]]:
    """(arrival in seconds, input tokens, output tokens) of each row."""
    parse = _json_rows if path.suffix == ".jsonl" else _csv_rows
    number = 0
    try:
        for number, row in enumerate(parse(lines), 1):  # noqa: B007  (named in the error)
            yield row
    except (KeyError, ValueError, TypeError) as error:
        raise TraceError(f"{path}: row {number + 1} is not of a known format: {error!r}") from None


def _json_rows(lines: Iterable[str]) -> Iterator[tuple[float, int, int]]:
    for line in lines:
        row = json.loads(line)
        yield float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"])


def _csv_rows(lines: Iterable[str]) -> Iterator[tuple[float, int, int]]:
    for row in csv.DictReader(lines):
        if "TIMESTAMP" in row:
            yield _seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])
        else:
            yield float(row["arrived_at"]), int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])


def _seconds(stamp: str) -> float:
    """UTC seconds of `2023-11-16 18:17:03.9799600`, whose seventh decimal datetime does not take."""
    whole, _, fraction = stamp.partition(".")
    return datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{fraction or 0}")
