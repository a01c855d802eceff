"""Renders one chat template in a process of its own, which may be killed at any time.

A template comes with the checkpoint, and nobody vouches for it. Jinja's sandbox keeps it from Python's
objects; but time and memory cannot be bounded from within (one expression may build a value whose text is
exponentially long, inside one call of C code). So the kernel bounds them: an alarm that nothing
catches ends the process, and so does memory beyond the limit.

Run as a script: it imports nothing of the server. Messages in both directions are JSON, each after its
length in four bytes. The first one in is the template; each further one is the variables of a rendering.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2.parser import Parser


class RefusedByTemplate(Exception):
    """The template itself called raise_exception()."""


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own words for training; here it is just a block."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def make_environment() -> jinja2.Environment:
    """What templates on the hub are written for: the settings and additions of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def render(template: jinja2.Template, job: dict[str, Any], max_chars: int) -> str:
    """Raises RefusedByTemplate for a name that may not be given, or for too much text."""
    given, extra = job["given"], job["extra"]
    for name in extra:
        if name in given or name in template.environment.globals or not name.isidentifier():
            raise RefusedByTemplate(f"'{name[:80]}' cannot be set for the template")
    pieces, num_chars = [], 0
    for piece in template.generate(given | extra):
        num_chars += len(piece)
        if num_chars > max_chars:
            raise RefusedByTemplate(f"its output is longer than {max_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's escaping of HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise RefusedByTemplate(str(message)[:500])


def _answer(work: Callable[[], str], timeout_s: float) -> dict[str, str]:
    """The result of `work()`, or why there is none, as it goes to the server."""
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        return {"text": work()}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it recurses too deeply"}
    except Exception as error:  # whatever a template may do wrong
        line = getattr(error, "lineno", None)
        cause = " ".join(str(error)[:500].split()) or type(error).__name__
        return {"error": cause if line is None else f"line {line}: {cause}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _read() -> Any:
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        sys.exit(0)  # the server closed its end, or is gone
    return json.loads(sys.stdin.buffer.read(struct.unpack("<I", head)[0]))


def _write(message: Any) -> None:
    raw = json.dumps(message).encode()
    sys.stdout.buffer.write(struct.pack("<I", len(raw)) + raw)
    sys.stdout.buffer.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, wherever it is
    setup = _read()
    max_bytes = setup["max_memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    timeout_s, max_chars = setup["timeout_s"], setup["max_chars"]
    templates: list[jinja2.Template] = []

    def compile_source() -> str:
        templates.append(make_environment().from_string(setup["source"]))
        return ""

    # The compiler works constant expressions out in advance, so it needs the alarm as well.
    _write(_answer(compile_source, timeout_s))
    while True:
        job = _read()
        _write(_answer(partial(render, templates[0], job, max_chars), timeout_s))


if __name__ == "__main__":
    main()
