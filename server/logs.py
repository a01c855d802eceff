"""The log: one line per event an operator needs, as `event key=value …` or as one JSON object.

Whatever is not printable is written escaped, so that nobody can forge a line or send an escape sequence
to a terminal; tracebacks are indented.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

MAX_VALUE_CHARS = 200

logger = logging.getLogger("octavo")


def configure_logging(log_format: str, level: str) -> None:
    """Write to stderr in the given format ("plain" or "json"). Called once by whoever runs the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else PlainFormatter())
    for name in ("octavo", "uvicorn.error"):
        target = logging.getLogger(name)
        target.handlers[:] = [handler]
        target.propagate = False
        target.setLevel(level.upper() if name == "octavo" else "WARNING")


def log(level: int, event: str, **fields: Any) -> None:
    """One line. `event` is a fixed phrase; what varies goes in `fields`. None values are left out."""
    if logger.isEnabledFor(level):
        present = {key: value for key, value in fields.items() if value is not None}
        logger.log(level, event, extra={"fields": present})


def info(event: str, **fields: Any) -> None:
    log(logging.INFO, event, **fields)


def sanitise(text: str, max_chars: int = MAX_VALUE_CHARS) -> str:
    """Printable characters only, so that a client can forge no line and send no escape sequence."""
    cut = text[:max_chars]
    return "".join(char if char.isprintable() else "?" for char in cut) + (
        "…" if len(text) > max_chars else ""
    )


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


class PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        parts = [f"{stamp}.{int(record.msecs):03d} {record.levelname:<7} {_escaped(record.getMessage())}"]
        parts += [f"{key}={_plain(value)}" for key, value in _fields(record).items()]
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        return "\n    ".join([" ".join(parts), *map(_escaped, trace)])


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _escaped(json.dumps(line, ensure_ascii=False, default=str))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    if text and text.isprintable() and " " not in text and '"' not in text:
        return text
    return _escaped(json.dumps(text, ensure_ascii=False))


def _escaped(text: str) -> str:
    """Every character that is not printable as JSON escapes it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
