"""A machine and the model on it, as numbers: what a simulation needs, and what replaces a measurement."""

from __future__ import annotations

import math
import tomllib
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any

from scheduler.costs import CostModel

if TYPE_CHECKING:
    from pathlib import Path

_LEAST = {"host_pages": 0, "disk_pages": 0}  # of the others there is one at least
_MAY_LACK = {"context_s": 0.0}  # by default attention costs by the pair alone


class MachineError(Exception):
    """A machine file that cannot be used. The text is one line that names the file and the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The fields after `costs` are those of `[scheduler]`, with the meaning of the settings of that name."""

    name: str
    costs: CostModel
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    max_model_len: int
    host_pages: int = 0
    disk_pages: int = 0


def load_machine(path: Path) -> Machine:
    """Read a TOML file: `name` (else the file's), `[costs]` as in `CostModel`, `[scheduler]` as in `Machine`.

    Raises MachineError for a file that is not there, is not TOML, or has a field missing, unknown or out of
    range.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MachineError(f"{path} is not TOML: {error}".splitlines()[0]) from None
    for key in document.keys() - {"name", "costs", "scheduler"}:
        raise MachineError(f"{path}: unknown field {key}; there are name, [costs] and [scheduler]")
    name = document.get("name", path.stem)
    if not isinstance(name, str):
        raise MachineError(f"{path}: name must be a string, not {name!r}")
    costs = {
        field.name: _cost(path, field.name, value)
        for field, value in _values(path, document, "costs", fields(CostModel), _MAY_LACK)
    }
    own = [field for field in fields(Machine) if field.name not in ("name", "costs")]
    may_lack = {field.name: field.default for field in own if field.default is not MISSING}
    limits = {
        field.name: _count(path, field.name, value)
        for field, value in _values(path, document, "scheduler", own, may_lack)
    }
    machine = Machine(name=name, costs=CostModel(**costs), **limits)
    if machine.max_model_len > machine.num_pages * machine.page_size:
        tokens = machine.num_pages * machine.page_size
        raise MachineError(f"{path}: num_pages hold {tokens} tokens, less than max_model_len")
    return machine


def _values(
    path: Path,
    document: dict[str, Any],
    section: str,
    known: tuple[Field[Any], ...] | list[Field[Any]],
    may_lack: dict[str, Any],
) -> list[tuple[Field[Any], object]]:
    table = document.get(section)
    if not isinstance(table, dict):
        raise MachineError(f"{path}: no table [{section}]")
    names = [field.name for field in known]
    for key in table.keys() - set(names):
        raise MachineError(f"{path}: [{section}] has no field {key}; there are {', '.join(names)}")
    for name in names:
        if name not in table and name not in may_lack:
            raise MachineError(f"{path}: [{section}] lacks {name}")
    return [(field, table.get(field.name, may_lack.get(field.name))) for field in known]


def _cost(path: Path, name: str, value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and value >= 0):  # type: ignore[arg-type,operator]
        raise MachineError(f"{path}: {name} must be seconds, at least 0, not {value!r}")
    cost = float(value)  # type: ignore[arg-type]
    if name == "step_s" and not cost:
        raise MachineError(
            f"{path}: step_s must be above 0: in steps that take no time, time would stand still"
        )
    return cost


def _count(path: Path, name: str, value: object) -> int:
    least = _LEAST.get(name, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MachineError(f"{path}: {name} must be a whole number, at least {least}, not {value!r}")
    return value
