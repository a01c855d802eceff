"""Traces of real arrivals: when, how many tokens in, how many out, whose.

Four formats are told apart by the names in their first line:
- Azure LLM inference (csv): TIMESTAMP (UTC), ContextTokens, GeneratedTokens
- ServeGen-derived (csv): arrived_at (s), num_prefill_tokens, num_decode_tokens, client_id
- Mooncake (jsonl): timestamp (ms), input_length, output_length
- generic (csv): arrival (s), input, output, and if need be tenant and priority
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


class TraceError(Exception):
    """The file is not a trace. The text names the file and, where there is one, the row."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival_s: float
    prompt_len: int
    output_len: int
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, the first at 0 s. `notes` say what was changed about the file."""

    name: str
    requests: tuple[TraceRequest, ...]
    notes: tuple[str, ...] = ()

    def changed(self, requests: Iterable[TraceRequest], note: str) -> Trace:
        return Trace(self.name, tuple(requests), (*self.notes, note))


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """The first `limit` rows, sorted by arrival. Lengths are at least 1. Raises TraceError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(islice(_rows(path, lines), limit))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TraceError(f"cannot read {path}: {reason}") from None
    if not rows:
        raise TraceError(f"{path} has no requests")
    rows.sort(key=lambda row: row.arrival_s)
    begin_s = rows[0].arrival_s
    return Trace(path.name, tuple(replace(row, arrival_s=row.arrival_s - begin_s) for row in rows))


def _rows(path: Path, lines: Iterable[str]) -> Iterator[TraceRequest]:
    parse = _json_rows if path.suffix == ".jsonl" else _csv_rows
    number = 0
    try:
        for number, row in enumerate(parse(lines), 1):  # noqa: B007  (named in the error)
            yield row
    except UnicodeDecodeError:
        raise
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise TraceError(f"{path}: row {number + 1} is not of a known format: {error!r}") from None


def _json_rows(lines: Iterable[str]) -> Iterator[TraceRequest]:
    for line in lines:
        row = json.loads(line)
        yield _request(float(row["timestamp"]) / 1000, row["input_length"], row["output_length"])


def _csv_rows(lines: Iterable[str]) -> Iterator[TraceRequest]:
    for row in csv.DictReader(lines):
        if "TIMESTAMP" in row:
            yield _request(_seconds(row["TIMESTAMP"]), row["ContextTokens"], row["GeneratedTokens"])
        elif "arrived_at" in row:
            arrival_s = float(row["arrived_at"])
            tenant = row.get("client_id") or ""
            yield _request(arrival_s, row["num_prefill_tokens"], row["num_decode_tokens"], tenant)
        else:
            tenant, priority = row.get("tenant") or "", int(row.get("priority") or 0)
            yield _request(float(row["arrival"]), row["input"], row["output"], tenant, priority)


def _request(
    arrival_s: float, prompt_len: str | int, output_len: str | int, tenant: str = "", priority: int = 0
) -> TraceRequest:
    """Raises ValueError for what is no time or no length."""
    if not 0.0 <= arrival_s < 1e12:
        raise ValueError(f"{arrival_s} is no time")
    lengths = int(prompt_len), int(output_len)
    if min(lengths) < 0:
        raise ValueError("a length is negative")
    return TraceRequest(arrival_s, max(1, lengths[0]), max(1, lengths[1]), tenant, priority)


def _seconds(timestamp: str) -> float:
    """Of "2023-11-16 18:17:03.9799600", which has a digit more than the standard library reads."""
    whole, _, fraction = timestamp.partition(".")
    moment = datetime.strptime(whole, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    return moment.timestamp() + float(f"0.{fraction or 0}")
