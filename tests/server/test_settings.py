"""Configuration: which source wins, what is refused and how it says so, and that printing loads back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import Config
from server.settings import (
    HIDDEN,
    SECTIONS,
    SETTINGS,
    Resolved,
    SettingsError,
    load,
    render,
    resolve,
    value_of,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "octavo.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_set_gives_the_defaults() -> None:
    assert load({}, {}) == Config()


def test_every_field_is_a_setting_and_names_are_unique() -> None:
    names = [entry.name for of in SECTIONS.values() for entry in fields(of) if entry.name != "scheduler"]
    assert sorted(names) == sorted(SETTINGS)
    assert all(setting.help for setting in SETTINGS.values())


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = toml(tmp_path, "[server]\nport = 1\nhost = '::1'\nmax_choices = 3\n")
    resolved = resolve({"port": "3"}, {"OCTAVO_PORT": "2", "OCTAVO_HOST": "0.0.0.0"}, path)
    server = resolved.config.server
    assert (server.port, server.host, server.max_choices, server.max_prompts) == (3, "0.0.0.0", 3, 128)
    assert resolved.origins == {
        "port": "flag --port",
        "host": "environment OCTAVO_HOST",
        "max_choices": str(path),
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("kv_cache_bytes", "2g", 2 * 2**30),
        ("kv_cache_bytes", "1.5G", 3 * 2**29),
        ("max_body_bytes", "16MiB", 16 * 2**20),
        ("max_body_bytes", "512kb", 512 * 2**10),
        ("max_model_len", "32k", 32768),
        ("max_num_batched_tokens", "2_048", 2048),
        ("request_timeout_s", "1e2", 100.0),
        ("request_timeout_s", "0.5", 0.5),
        ("prefix_cache", "off", False),
        ("log_prompts", "YES", True),
        ("api_keys", "a, b,c", ("a", "b", "c")),
        ("served_model_name", "a, org/b", ("a", "org/b")),
        ("served_model_name", "", ()),
        ("cors_allow_origins", "a, b,,c", ("a", "b", "c")),
        ("dtype", "float32", "float32"),
    ],
)
def test_text_is_parsed_by_the_type_of_the_field(name: str, text: str, value: object) -> None:
    config = load({}, {f"OCTAVO_{name.upper()}": text})
    parsed = value_of(config, SETTINGS[name])
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("port", "65536", "port must be at least 0 and at most 65535, not '65536' (flag --port)"),
        ("port", "-1", "port must be at least 0"),
        ("port", "http", "port must be a whole number"),
        ("port", "80.5", "port must be a whole number"),
        ("port", "", "port must be a whole number"),
        ("port", True, "port must be a whole number"),
        ("max_num_seqs", "0", "max_num_seqs must be at least 1"),
        ("reserve_share", "1", "reserve_share must be at least 0 and at most 0.5"),
        ("min_shared_tokens", "1", "min_shared_tokens must be at least 16"),
        ("static_quantum_s", "nan", "static_quantum_s must be at least 0.001"),
        ("request_timeout_s", "inf", "request_timeout_s must be at least 0"),
        ("max_num_seqs", "1e400", "max_num_seqs must be a whole number"),
        ("dtype", "int8", "dtype must be one of auto, bfloat16, float16, float32"),
        ("device", "tpu", "device must be one of auto, cpu, cuda"),
        ("policy", "lifo", "policy must be one of mlfq, mlfq-static, fcfs, priority, hrrn, srpt"),
        ("log_format", "xml", "log_format must be one of plain, json"),
        ("prefix_cache", "maybe", "prefix_cache must be true or false"),
        ("host", 3, "host must be a string"),
        ("api_keys", [1], "api_keys must be a list of strings"),
        ("api_keys", "a,,b", "api_keys must be a list without empty or space-padded items (flag --api-keys)"),
        ("api_keys", "", "api_keys must be a list without empty"),
        ("api_keys", " , ", "api_keys must be a list without empty"),
        ("api_keys", [""], "api_keys must be a list without empty"),
        ("api_keys", ["a", "b "], "api_keys must be a list without empty"),
        ("admin_key", HIDDEN, "admin_key must be filled in"),
        ("max_tenant_requests", "-1", "max_tenant_requests must be at least 0"),
        ("tenant_tokens_per_minute", "1e13", "tenant_tokens_per_minute must be at least 0 and at most 1e+12"),
    ],
)
def test_a_bad_value_names_its_setting(name: str, raw: object, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({name: raw}, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[servr]\n", "no table [servr]; did you mean server?"),
        ("[server]\nprot = 1\n", "[server] has no setting prot; did you mean port?"),
        ("[server]\nmax_num_seqs = 1\n", "max_num_seqs belongs to [scheduler], not [server]"),
        ("server = 1\n", "server must be a table"),
        ("[server\n", "is not TOML"),
        ("[server]\nport = '80x'\n", "port must be a whole number"),
        ("[server]\nport = 8.0\n", "port must be a whole number"),
        ("[server]\napi_keys = 'a'\nport = [1]\n", "port must be a whole number"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({}, {}, toml(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["['']", "['a', ' b']", "''", "'a,'"])
def test_an_empty_or_padded_key_is_refused_from_every_source(tmp_path: Path, value: str) -> None:
    with pytest.raises(SettingsError, match="api_keys must be a list without empty"):
        load({}, {}, toml(tmp_path, f"[server]\napi_keys = {value}\n"))
    with pytest.raises(SettingsError, match="api_keys must be a list without empty"):
        load({}, {"OCTAVO_API_KEYS": " , a"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read .*absent\.toml"):
        load({}, {}, tmp_path / "absent.toml")


def test_unknown_variables_only_warn_and_empty_ones_are_unset() -> None:
    environ = {
        "OCTAVO_PROT": "1",
        "OCTAVO_VECTORS": "x",
        "OCTAVO_CONFIG": "y",
        "OCTAVO_PORT": "",
        "HOME": "/",
    }
    resolved = resolve({}, environ)
    assert resolved.config == Config()
    assert resolved.warnings == ("environment variable OCTAVO_PROT is no setting; did you mean OCTAVO_PORT?",)


def test_a_value_that_another_overrides_is_not_judged(tmp_path: Path) -> None:
    path = toml(tmp_path, "[server]\nport = 'none'\nhost = 3\n")
    resolved = resolve({"port": "3"}, {"OCTAVO_PORT": "x", "OCTAVO_HOST": "::1", "OCTAVO_MODEL": "m"}, path)
    assert (resolved.config.server.port, resolved.config.server.host) == (3, "::1")
    with pytest.raises(SettingsError, match="port must be a whole number"):
        load({}, {"OCTAVO_PORT": "x"}, path)


def link(service: str, port: int, protocol: str = "tcp", address: str = "10.0.0.1") -> dict[str, str]:
    """What Kubernetes puts into every container's environment for a Service."""
    name, url = service.upper().replace("-", "_"), f"{protocol}://{address}:{port}"
    base = f"{name}_PORT_{port}_{protocol.upper()}"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": str(port),
        f"{name}_SERVICE_PORT_HTTP_MAIN": str(port),
        f"{name}_PORT": url,
        base: url,
        f"{base}_PROTO": protocol,
        f"{base}_PORT": str(port),
        f"{base}_ADDR": address,
    }


SERVICES = ["octavo", "octavo-host", "octavo-port", "octavo-max-num-seqs", "octavo-config", "octavo-service"]


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(
    ("protocol", "address"), [("tcp", "10.0.0.1"), ("udp", "fd00::1"), ("sctp", "1.2.3.4")]
)
def test_a_service_of_kubernetes_is_no_setting(service: str, protocol: str, address: str) -> None:
    environ = link(service, 8000, protocol, address)
    resolved = resolve({}, environ)
    assert resolved.config == Config()
    [warning] = resolved.warnings
    assert all(variable in warning for variable in environ)


def test_a_setting_beside_a_service_of_its_name_is_one() -> None:
    environ = link("octavo", 8000) | {"OCTAVO_PORT": "9000"}
    assert load({}, environ).server.port == 9000
    assert load({"port": "9001"}, link("octavo", 8000)).server.port == 9001
    with pytest.raises(SettingsError, match="port must be a whole number"):
        load({}, {"OCTAVO_PORT": "http://10.0.0.1:8000"})
    resolved = resolve({}, {"OCTAVO_HTTP_PORT": "8000"})
    assert resolved.warnings[0].startswith("environment variable OCTAVO_HTTP_PORT is no setting")


@pytest.mark.parametrize("names", ["a", "a,b,c", "a,,b,c", ["a", ""]])
def test_there_is_a_name_for_every_key_or_none(names: object) -> None:
    with pytest.raises(SettingsError, match="api_key_names must name every key of api_keys"):
        load({"api_keys": "k1,k2", "api_key_names": names}, {})
    assert load({"api_keys": "k1,k2", "api_key_names": "a,a"}, {}).server.api_key_names == ("a", "a")


def test_secrets_are_never_repeated() -> None:
    resolved = resolve({"api_keys": "hunter2", "admin_key": "hunter2"}, {})
    assert "hunter2" not in render(resolved)
    assert f'admin_key = "{HIDDEN}"' in render(resolved)
    assert "hunter2" in render(resolved, show_secrets=True)
    with pytest.raises(SettingsError) as caught:
        load({"api_keys": ["hunter2", 3]}, {})
    assert "hunter2" not in str(caught.value)


def test_a_masked_configuration_does_not_load_as_one_without_keys(tmp_path: Path) -> None:
    printed = render(resolve({"api_keys": "hunter2"}, {}))
    assert HIDDEN in printed
    with pytest.raises(SettingsError, match="api_keys must be filled in"):
        load({}, {}, toml(tmp_path, printed))


def test_printing_names_the_origin_of_what_is_not_default() -> None:
    lines = render(resolve({"port": "9000"}, {"OCTAVO_MAX_CHOICES": "16"})).splitlines()
    assert "port = 9000  # flag --port" in lines
    assert "max_choices = 16" in lines  # set, but to its default


def values_of(name: str) -> st.SearchStrategy[Any]:
    setting = SETTINGS[name]
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda s: s != HIDDEN)
    if setting.choices:
        return st.sampled_from(setting.choices)
    if setting.kind is tuple:
        item = text.map(str.strip).filter(bool) if setting.secret else text
        return st.lists(item, max_size=3).map(tuple)
    top = None if setting.maximum == float("inf") else int(setting.maximum)
    return {
        bool: st.booleans(),
        int: st.integers(int(setting.minimum), top or 2**50),
        float: st.floats(setting.minimum, min(setting.maximum, 1e9)),
        str: text.map(str.strip),
    }[setting.kind]


@given(st.fixed_dictionaries({}, optional={name: values_of(name) for name in SETTINGS}))
def test_any_configuration_prints_as_toml_that_loads_back(
    tmp_path_factory: pytest.TempPathFactory, flags: dict[str, object]
) -> None:
    if flags.get("api_key_names"):
        flags = {name: value for name, value in flags.items() if name not in ("api_keys", "api_key_names")}
    resolved = resolve(flags, {})
    path = tmp_path_factory.mktemp("printed") / "octavo.toml"
    path.write_text(render(resolved, show_secrets=True), encoding="utf-8")
    assert load({}, {}, path) == resolved.config


def test_the_configuration_is_frozen() -> None:
    config = Config()
    assert is_dataclass(config)
    with pytest.raises(AttributeError):
        config.server.port = 1  # type: ignore[misc]


def test_a_resolution_without_sources_prints_every_setting() -> None:
    printed = render(Resolved(Config(), {}))
    assert all(f"\n{name} = " in printed for name in SETTINGS)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_the_shipped_files_load(path: Path) -> None:
    assert load({}, {}, path) != Config()
