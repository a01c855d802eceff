"""What the scripts share, in whatever environment they run: the standard library alone.

A script names its calls by decorated functions. Each is made once, within a time, and its verdict printed
as a line of JSON: `works`, `refused` with the error that is documented, `FAILS`, or `cannot` where the client
has no such call. A call that may be refused asserts the whole right answer all the same: once Octavo keeps
what it asks for, the verdict changes by itself, and an answer that drops the demand FAILS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version

URL = os.environ["CLIENT_URL"]  # of the API, with /v1
KEY = os.environ["CLIENT_KEY"]
MODEL = os.environ["CLIENT_MODEL"]
CALL_TIMEOUT_S = 300
TIMEOUT_S = 240  # of a request, which a busy machine needs
Kinds = type[BaseException] | tuple[type[BaseException], ...]  # of errors, as `except` takes them

SYSTEM = "You answer in one short sentence."
QUESTION = "What is the capital of France?"
ANSWER = "Paris"  # in the default model's greedy answer
LONG_TASK = "Write a very long story about a lighthouse, its keeper and the sea."
LARGE_PROMPT = "The sea was calm and the light was on. " * 230 + QUESTION
TOO_LARGE_PROMPT = "The sea was calm and the light was on. " * 2000
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CITY_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "inhabitants": {"type": "integer"}},
    "required": ["city", "inhabitants"],
    "additionalProperties": False,
}


class Calls:
    """The calls of one client; `package` is what its version is read of."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._calls: dict[str, Callable[[], None]] = {}
        self._cannot: dict[str, str] = {}

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        """A call that must work. The function's name is the call's, bar a `_` at its end."""
        self._calls[call.__name__.rstrip("_")] = call
        return call

    def or_refused(self, error: Kinds, *words: str) -> Callable[[Callable[[], None]], None]:
        """A call that may be refused: by the client's own `error`, in whose text every word is found."""

        def add(call: Callable[[], None]) -> None:
            def guarded() -> None:
                try:
                    call()
                except error as refusal:
                    text = " | ".join(_texts(refusal))
                    if not all(word in text for word in words):
                        raise
                    raise Refused(text) from refusal

            self._calls[call.__name__.rstrip("_")] = guarded

        return add

    def cannot(self, **reasons: str) -> None:
        self._cannot |= reasons

    def run(self) -> None:
        """Prints all verdicts. Names on the command line select some."""
        chosen = [name for name in self._calls if not sys.argv[1:] or name in sys.argv[1:]]
        _tell(version=version(self._package), calls=[*chosen, *self._cannot])
        for name, reason in self._cannot.items():
            _tell(call=name, verdict="cannot", detail=reason)
        signal.signal(signal.SIGALRM, _out_of_time)
        for name in chosen:
            verdict, detail = _try(self._calls[name])
            _tell(call=name, verdict=verdict, detail=detail)
        sys.stdout.flush()
        os._exit(0)  # some clients keep threads that end late or never


class Refused(Exception):
    """The documented refusal came."""


class OutOfTime(BaseException):
    """Not an Exception: no client may take it for one of its own and try again."""


def raises(error: Kinds, *words: str) -> _Raises:
    """Its block must raise the client's own `error`, in whose text every word is found."""
    return _Raises(error, words)


class _Raises:
    def __init__(self, error: Kinds, words: tuple[str, ...]) -> None:
        self._error, self._words = error, words

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, raised: BaseException | None, _trace: object) -> bool:
        assert raised is not None, f"no {self._error} came"
        if not isinstance(raised, self._error):
            return False
        text = " | ".join(_texts(raised))
        assert all(word in text for word in self._words), f"{self._words} are not all in {text}"
        return True


def _try(call: Callable[[], None]) -> tuple[str, str]:
    signal.alarm(CALL_TIMEOUT_S)
    try:
        call()
    except Refused as refusal:
        return "refused", str(refusal)[:600]
    except OutOfTime:
        return "FAILS", f"no end within {CALL_TIMEOUT_S} s"
    except BaseException as error:  # ExceptionGroup and SystemExit too
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1].line
        return "FAILS", f"{place}: {' | '.join(_texts(error))}"[:600]
    finally:
        signal.alarm(0)
    return "works", ""


def _texts(error: BaseException | None) -> Iterator[str]:
    """Of the error and of what it came from: many clients wrap the error of another."""
    while error is not None:
        fields = {name: getattr(error, name, None) for name in ("status_code", "code", "param", "body")}
        told = " ".join(f"{name}={value}" for name, value in fields.items() if value)
        yield f"{type(error).__name__}: {error} {told}".rstrip()
        for inner in getattr(error, "exceptions", ()):
            yield from _texts(inner)
        error = error.__cause__ or error.__context__


def _out_of_time(*_: object) -> None:
    raise OutOfTime


def _tell(**line: object) -> None:
    print(json.dumps(line), flush=True)
