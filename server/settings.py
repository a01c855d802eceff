"""The configuration, loaded once: defaults < TOML file < environment < flags.

Every setting is a field of `ServerConfig`, `EngineConfig` or `SchedulerConfig`; its type, default and
`metadata` (help, min, max, choices, secret) are all that this module knows of it. A value that comes
as text is parsed by the field's type; integers take the binary suffixes k, m, g and t (32k = 32768).
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
import typing
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any

from engine.config import EngineConfig
from scheduler.config import SchedulerConfig
from server.config import Config, ServerConfig

if typing.TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SECTIONS: dict[str, type] = {"server": ServerConfig, "engine": EngineConfig, "scheduler": SchedulerConfig}
ENVIRONMENT_PREFIX = "OCTAVO_"
# Variables that share the prefix and are no settings of the daemon.
OTHER_VARIABLES = frozenset(
    {
        "OCTAVO_CONFIG",
        "OCTAVO_VECTORS",
        "OCTAVO_URL",
        "OCTAVO_API_KEY",
        "OCTAVO_ENGINE_LOG",
        "OCTAVO_TEST_INSTALL",
    }
)
HIDDEN = "<hidden>"  # stands for a secret in a printed configuration; refused when it is loaded

_SUFFIXES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_NUMBER = re.compile(r"([+-]?[0-9_]*\.?[0-9_]*)\s*([kmgt]?)(?:i?b)?")
_SERVICE_HOST = "_SERVICE_HOST"
_OF_SERVICE = re.compile(
    r"_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?", re.ASCII
)
_SERVICE_URL = re.compile(r"(?:tcp|udp|sctp)://.+:\d+")
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True}
_BOOLEANS |= {"0": False, "false": False, "no": False, "off": False}


class SettingsError(Exception):
    """A setting cannot be used. The text is one line that names it and where it came from."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the configuration. `kind` is bool, int, float, str or tuple (of strings)."""

    section: str
    name: str
    kind: type
    default: Any
    help: str
    minimum: float
    maximum: float
    choices: tuple[str, ...]
    secret: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration, where each value that was set came from (by field name), and what to warn of."""

    config: Config
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def load(flags: Mapping[str, object], environ: Mapping[str, str], toml_path: Path | None = None) -> Config:
    """The configuration alone; see `resolve`."""
    return resolve(flags, environ, toml_path).config


def resolve(
    flags: Mapping[str, object], environ: Mapping[str, str], toml_path: Path | None = None
) -> Resolved:
    """Combine the sources. `flags` maps field names to values, parsed or as text.

    Raises SettingsError, naming the setting, for an unknown one or a value that it cannot have.
    """
    environment, warnings = _from_environment(environ)
    sources = _from_toml(toml_path) if toml_path else []
    # The last one wins; a value that does not is not judged either.
    given = {
        setting.name: (setting, raw, origin)
        for setting, raw, origin in [*sources, *environment, *_from_flags(flags)]
    }
    values = {name: parse(*value) for name, value in given.items()}
    origins = {name: origin for name, (_, _, origin) in given.items()}
    return Resolved(_compose(values), origins, tuple(warnings))


def value_of(config: Config, setting: Setting) -> Any:
    """The value that a configuration has for one setting."""
    return getattr(_section(config, setting.section), setting.name)


def parse(setting: Setting, raw: object, origin: str) -> object:
    """`raw` as a value of the setting, in range. Raises SettingsError."""
    try:
        value = _as_text(setting, raw.strip()) if isinstance(raw, str) else _as_value(setting, raw)
        _check(setting, value)
    except ValueError as error:
        # The value of a secret is not repeated: this line ends up in logs.
        shown = "" if setting.secret else f", not {raw!r}"
        raise SettingsError(f"{setting.name} must be {error}{shown} ({origin})") from None
    return value


def render(resolved: Resolved, *, show_secrets: bool = False) -> str:
    """The configuration as TOML that loads back to the same value, with the origin of what was set.

    Secrets are replaced by a mark that does not load, so that no server starts on a masked key.
    """
    lines: list[str] = []
    for section in SECTIONS:
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        for setting in (s for s in SETTINGS.values() if s.section == section):
            value = value_of(resolved.config, setting)
            if setting.secret and value and not show_secrets:
                value = (HIDDEN,) if setting.kind is tuple else HIDDEN
            origin = resolved.origins.get(setting.name)
            comment = f"  # {origin}" if origin and value != setting.default else ""
            lines.append(f"{setting.name} = {_toml(value)}{comment}")
    return "\n".join(lines) + "\n"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name closest to an unknown one, if any is close."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _settings_of(section: str, config_class: type) -> Iterable[Setting]:
    hints = typing.get_type_hints(config_class)
    for entry in fields(config_class):
        kind = typing.get_origin(hints[entry.name]) or hints[entry.name]
        if kind in (bool, int, float, str, tuple):
            yield _setting(section, entry, kind)


def _setting(section: str, entry: Field[Any], kind: type) -> Setting:
    about = entry.metadata
    assert entry.default is not MISSING, entry.name
    return Setting(
        section=section,
        name=entry.name,
        kind=kind,
        default=entry.default,
        help=about["help"],
        minimum=about.get("min", 0),
        maximum=about.get("max", math.inf),
        choices=tuple(about.get("choices", ())),
        secret=about.get("secret", False),
    )


SETTINGS: dict[str, Setting] = {
    setting.name: setting for section, of in SECTIONS.items() for setting in _settings_of(section, of)
}


def _from_toml(path: Path) -> list[tuple[Setting, object, str]]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    found = []
    for section, table in document.items():
        if section not in SECTIONS:
            raise SettingsError(f"{path}: no table [{section}]{nearest(section, SECTIONS)}")
        if not isinstance(table, dict):
            raise SettingsError(f"{path}: {section} must be a table")
        for name, raw in table.items():
            found.append((_in_section(path, section, name), raw, str(path)))
    return found


def _in_section(path: Path, section: str, name: str) -> Setting:
    setting = SETTINGS.get(name)
    if setting is None:
        raise SettingsError(f"{path}: [{section}] has no setting {name}{nearest(name, SETTINGS)}")
    if setting.section != section:
        raise SettingsError(f"{path}: {name} belongs to [{setting.section}], not [{section}]")
    return setting


def _from_environment(environ: Mapping[str, str]) -> tuple[list[tuple[Setting, object, str]], list[str]]:
    """An empty variable counts as unset: compose files cannot leave one out. So does what Kubernetes puts
    there for a Service whose name begins with octavo."""
    by_variable = {setting.variable: setting for setting in SETTINGS.values()}
    services = [name.removesuffix(_SERVICE_HOST) for name in environ if name.endswith(_SERVICE_HOST)]
    found: list[tuple[Setting, object, str]] = []
    warnings, links = [], []
    for variable, raw in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in OTHER_VARIABLES:
            continue
        setting = by_variable.get(variable)
        if _is_service_link(variable, raw, services, known=setting is not None):
            links.append(variable)
        elif setting is None:
            warnings.append(f"environment variable {variable} is no setting{nearest(variable, by_variable)}")
        elif raw:
            found.append((setting, raw, f"environment {variable}"))
    if links:
        warnings.append(f"skipped what Kubernetes tells of a Service: {', '.join(sorted(links))}")
    return found, warnings


def _is_service_link(variable: str, raw: str, services: Iterable[str], *, known: bool) -> bool:
    """NAME_PORT=tcp://10.0.0.1:80, and what stands beside it: NAME_SERVICE_HOST and its like. Where the
    name is also a setting's only such a value counts: a pod may set OCTAVO_PORT beside the link."""
    if variable.endswith("_PORT") and _SERVICE_URL.fullmatch(raw):
        return True
    rests = (variable.removeprefix(name) for name in services if variable.startswith(name))
    return not known and any(_OF_SERVICE.fullmatch(rest) for rest in rests)


def _from_flags(flags: Mapping[str, object]) -> list[tuple[Setting, object, str]]:
    return [(SETTINGS[name], raw, f"flag {SETTINGS[name].flag}") for name, raw in flags.items()]


def _as_text(setting: Setting, text: str) -> object:
    """Parse text by the setting's type. The ValueError's text completes "must be"."""
    if setting.kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError("true or false")
        return _BOOLEANS[text.lower()]
    if setting.kind is tuple:
        parts = tuple(part.strip() for part in text.split(","))
        # Empty secrets are kept, for `_check` to refuse: `--api-keys ""` must not open the server.
        return parts if setting.secret else tuple(part for part in parts if part)
    if setting.kind is str:
        return text
    number = _parse_number(text, "a number" if setting.kind is float else "a whole number (16, 32k, 2g)")
    return number if setting.kind is float else _whole(number)


def _parse_number(text: str, expected: str) -> float:
    match = _NUMBER.fullmatch(text.lower())
    if match is None:  # exponents, which no suffix goes with
        try:
            return float(text)
        except ValueError:
            raise ValueError(expected) from None
    digits, suffix = match.groups()
    try:
        value: float = float(digits) if "." in digits else int(digits)
    except ValueError:
        raise ValueError(expected) from None
    return value * _SUFFIXES[suffix]


def _whole(number: float) -> int:
    if not math.isfinite(number) or number != int(number):
        raise ValueError("a whole number")
    return int(number)


def _as_value(setting: Setting, raw: object) -> object:
    """Take a value that TOML or a caller has typed already; no conversion but int to float."""
    if setting.kind is tuple and isinstance(raw, list | tuple) and all(isinstance(x, str) for x in raw):
        return tuple(raw)
    if setting.kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    if setting.kind is not tuple and type(raw) is setting.kind:
        return raw
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    raise ValueError(names.get(setting.kind, "a list of strings"))


def _check(setting: Setting, value: object) -> None:
    if setting.secret:
        _check_secret(value)
    if setting.choices and value not in setting.choices:
        raise ValueError("one of " + ", ".join(setting.choices))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not (math.isfinite(value) and setting.minimum <= value <= setting.maximum):
        top = f" and at most {setting.maximum:g}" if math.isfinite(setting.maximum) else ""
        raise ValueError(f"at least {setting.minimum:g}{top}")


def _check_secret(value: object) -> None:
    items = value if isinstance(value, tuple) else (value,)
    if HIDDEN in items:
        raise ValueError(f"filled in: {HIDDEN} is how --print-config masks it")
    if isinstance(value, tuple) and any(not item or item != item.strip() for item in value):
        raise ValueError("a list without empty or space-padded items")


def _check_together(server: ServerConfig) -> None:
    names, keys = server.api_key_names, server.api_keys
    if names and (len(names) != len(keys) or not all(names)):
        raise SettingsError(
            f"api_key_names must name every key of api_keys: {len(names)} names, {len(keys)} keys"
        )


def _compose(values: Mapping[str, object]) -> Config:
    def part(section: str) -> dict[str, Any]:
        return {name: value for name, value in values.items() if SETTINGS[name].section == section}

    engine = replace(EngineConfig(), scheduler=SchedulerConfig(**part("scheduler")), **part("engine"))
    server = ServerConfig(**part("server"))
    _check_together(server)
    return Config(server=server, engine=engine)


def _section(config: Config, section: str) -> ServerConfig | EngineConfig | SchedulerConfig:
    if section == "server":
        return config.server
    return config.engine if section == "engine" else config.engine.scheduler


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        # A JSON string is a TOML string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
