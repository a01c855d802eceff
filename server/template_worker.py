"""Renders one chat template in a process of its own, which may be killed at any time.

A template comes with the checkpoint, and nobody vouches for it. Jinja's sandbox keeps it from Python's
objects; but time and memory cannot be bounded from within (one expression may build a value whose text is
exponentially long, inside one call of C code). So the kernel bounds them: an alarm that nothing
catches ends the process, and so does memory beyond the limit.

Run as a script: it imports nothing of the server. Messages in both directions are JSON, each after its
length in four bytes. The first one in is the template; each further one asks for a rendering, or for what
the template can show.
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
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

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


class Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which are Python's own."""

    def __init__(*args: Any, **names: Any) -> None:  # `self` may be one of the names
        self, *given = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*given, **names).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold '{name}'")
        super().__setitem__(name, value)


def make_environment() -> jinja2.Environment:
    """What templates on the hub are written for: the settings and additions of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["namespace"] = Namespace
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


def traits(template: jinja2.Template, variables: dict[str, Any]) -> dict[str, Any]:
    """What the template can show, found by trying: for each role, content as a string and as a list of
    text parts; and whether a tool call's arguments may be an object. `variables`: the special tokens."""

    def shown(*messages: dict[str, Any]) -> str:
        given = {
            "messages": list(messages),
            "tools": [_TOOL],
            "documents": None,
            "add_generation_prompt": False,
        }
        try:
            return template.render(variables | given)
        except Exception:  # the template refuses such messages, or does not know them
            return ""

    def shows_object() -> bool:
        text = shown(_USER, _call({_FIRST: _SECOND}))
        return _FIRST in text and f"'{_FIRST}'" not in text  # as JSON or XML, not as Python prints it

    return {
        "string_roles": [role for role in _BEFORE if _FIRST in shown(*_with_content(role, _FIRST))],
        "part_roles": [role for role in _BEFORE if _is_text_alone(shown(*_with_content(role, _PARTS)))],
        "object_arguments": shows_object()
        or _FIRST not in shown(_USER, _call(json.dumps({_FIRST: _SECOND}))),
    }


_FIRST, _SECOND = "octavo-first", "octavo-second"  # what the tries look for
_PARTS = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]
_USER = {"role": "user", "content": "x"}
_FUNCTION = {"name": "try", "description": "x", "parameters": {"type": "object", "properties": {}}}
_TOOL = {"type": "function", "function": _FUNCTION}


def _call(arguments: Any) -> dict[str, Any]:
    function = {"name": "try", "arguments": arguments}
    call = {"id": "octavo123", "type": "function", "function": function}  # Mistral wants nine characters
    return {"role": "assistant", "content": "", "tool_calls": [call]}


# Roles, and the messages that may come before one
_BEFORE = {"user": [], "system": [], "assistant": [_USER], "tool": [_USER, _call({})]}


def _with_content(role: str, content: Any) -> list[dict[str, Any]]:
    message = {"role": role, "content": content}
    if role == "tool":
        message |= {"name": "try", "tool_call_id": "octavo123"}
    return [*_BEFORE[role], message, *([] if role == "user" else [_USER])]


def _is_text_alone(shown: str) -> bool:
    """Whether both parts are there, and between them nothing of the list that they came in."""
    _, found, rest = shown.partition(_FIRST)
    between, also_found, _ = rest.partition(_SECOND)
    return bool(found and also_found) and "text" not in between


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


def _answer(work: Callable[[], Any], timeout_s: float) -> dict[str, Any]:
    """The result of `work()`, or why there is none, as it goes to the server."""
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        return {"result": work()}
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


def _do(template: jinja2.Template, job: dict[str, Any], max_chars: int) -> Any:
    return traits(template, job["try_with"]) if "try_with" in job else render(template, job, max_chars)


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

    def compile_source() -> None:
        templates.append(make_environment().from_string(setup["source"]))

    # The compiler works constant expressions out in advance, so it needs the alarm as well.
    _write(_answer(compile_source, timeout_s))
    while True:
        job = _read()
        _write(_answer(partial(_do, templates[0], job, max_chars), timeout_s))


if __name__ == "__main__":
    main()
