"""Typed reading of configurations that nobody vouches for. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.weights.errors import CheckpointError

_MAX_SHOWN = 80
_MAX_NUMBER = sys.float_info.max  # JSON has integers beyond it


@dataclass(frozen=True, slots=True)
class Fields:
    """A wrong value is a CheckpointError that names `source`, the field (after `prefix`) and the value.

    Absent and null fields have the default; without one they are refused.
    """

    source: str
    values: Mapping[str, Any]
    prefix: str = ""

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(name, default)
        if type(value) is not int or not least <= value < 2**31:
            raise self.unsupported(name, value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """More than 0, and finite."""
        value = self._get(name, default)
        if not _is_positive(value):
            raise self.unsupported(name, value)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self.unsupported(name, value)
        return value

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """`length` numbers, all more than 0."""
        values = self._get(name, None)
        if not isinstance(values, list | tuple) or len(values) != length:
            raise self.unsupported(name, values, f"; {length} numbers are needed")
        if not all(map(_is_positive, values)):
            raise self.unsupported(name, values)
        return tuple(map(float, values))

    def items(self, name: str, length: int, kinds: tuple[type, ...]) -> tuple[Any, ...] | None:
        """A list of `length` values of these types, or None where there is no such field."""
        values = self.values.get(name)
        if values is None:
            return None
        if not isinstance(values, list | tuple) or len(values) != length:
            raise self.unsupported(name, values, f"; {length} values are needed")
        if not all(type(value) in kinds for value in values):
            raise self.unsupported(name, values)
        return tuple(values)

    def within(self, name: str) -> Fields:
        """An object of further fields; empty where there is none."""
        value = self.values.get(name) or {}
        if not isinstance(value, Mapping):
            raise self.unsupported(name, value)
        return Fields(self.source, value, f"{self.prefix}{name}.")

    def check(self, name: str, *allowed: object) -> None:
        """Refuse any value but these; absent and null always pass."""
        value = self.values.get(name)
        if value is not None and not any(value == known for known in allowed):
            raise self.unsupported(name, value)

    def unsupported(self, name: str, value: object, more: str = "") -> CheckpointError:
        return unsupported(f"{self.source} {self.prefix}{name}", value, more)

    def _get(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.source} lacks {self.prefix}{name}")
        return default if value is None else value


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= _MAX_NUMBER


def unsupported(name: str, value: object, more: str = "") -> CheckpointError:
    shown = repr(value)
    shown = shown if len(shown) <= _MAX_SHOWN else shown[: _MAX_SHOWN - 3] + "..."
    return CheckpointError(f"{name} = {shown} is not supported{more}")


def decimal(value: float) -> float:
    """GGUF keeps 32 bits; 9.99999974e-06 was written for 1e-05."""
    return float(f"{value:.7g}")
