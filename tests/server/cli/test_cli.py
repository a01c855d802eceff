"""The command line as a user meets it: help, errors on one line, statuses, and a fast start."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from argparse import Namespace
from typing import TYPE_CHECKING

import pytest

from server import cli
from server.commands import serve
from server.settings import SETTINGS, SettingsError, load
from server.version import octavo_version

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_octavo_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.delenv("OCTAVO_CONFIG", raising=False)


def status_of(*argv: str) -> int:
    try:
        return cli.main(argv)
    except SystemExit as exit_:
        return int(exit_.code or 0)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: octavo {command}")


def test_the_help_of_serve_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    status_of("serve", "--help")
    printed = " ".join(capsys.readouterr().out.split())
    for setting in SETTINGS.values():
        assert setting.flag in printed
        assert setting.help in printed
    assert "--prefix-cache, --no-prefix-cache" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("serv",), "invalid choice: 'serv'"),
        (("serve", "--max-num-seq", "3"), "unknown argument --max-num-seq; did you mean --max-num-seqs?"),
        (("serve", "--prot=3"), "did you mean --port?"),
        (("serve", "--port", "web"), "port must be a whole number"),
        (("serve", "a", "--model", "b"), "MODEL is given twice"),
        (("serve", "--config", "/absent.toml"), "cannot read /absent.toml"),
        (("bench", "--workload", "F"), "invalid choice: 'F'"),
        (("bench", "--requests", "-1"), "--requests: must be a whole number of at least 1, not '-1'"),
        (("bench", "--max-input", "0"), "--max-input: must be a whole number of at least 1, not '0'"),
        (("bench", "--timeout", "nan"), "--timeout: must be a number over 0, not 'nan'"),
        (("chat", "--max-tokens", "few"), "--max-tokens: must be a whole number of at least 1, not 'few'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_two(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(*argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("octavo")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    "argv",
    [
        ("models", "/absent/model.gguf"),
        ("complete", "", "--url", "http://127.0.0.1:1"),
        ("complete", "x", "--url", "http://127.0.0.1:1"),
        ("chat", "--url", "http://127.0.0.1:1"),
        ("bench", "--url", "http://127.0.0.1:1"),
        ("chat", "--url", "http://x:99999"),
        ("complete", "x", "--url", "http://x:web"),
        ("chat", "--url", "http://[::1"),
        ("chat", "--url", "http://a b"),
        ("chat", "--url", "http://x..y"),
        ("chat", "--url", "http://127.0.0.1:1", "--api-key", "a\nb"),
        ("bench", "--url", "http://x:99999"),
        ("bench", "--workload", "trace"),
        ("bench", "--workload", "trace", "--trace", "/absent.csv"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_one(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(*argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"octavo {argv[0]}: ")
    assert error.count("\n") == 1


def test_print_config_loads_back_and_says_where_values_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "octavo.toml"
    file.write_text("[engine]\nkv_cache_bytes = '2g'\n")
    monkeypatch.setenv("OCTAVO_CONFIG", str(file))
    monkeypatch.setenv("OCTAVO_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("OCTAVO_TYPO", "7")
    assert status_of("serve", "some/model", "--no-prefix-cache", "--print-config") == 0
    printed = capsys.readouterr()
    assert "OCTAVO_TYPO" in printed.err
    assert "max_num_seqs = 7  # environment OCTAVO_MAX_NUM_SEQS" in printed.out
    assert f"kv_cache_bytes = 2147483648  # {file}" in printed.out
    tomllib.loads(printed.out)
    again = tmp_path / "again.toml"
    again.write_text(printed.out)
    config = load({}, {}, again)
    assert config.engine.model == "some/model"
    assert config.engine.scheduler.prefix_cache is False
    assert (config.engine.kv_cache_bytes, config.engine.scheduler.max_num_seqs) == (2**31, 7)


def test_print_config_masks_keys_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    status_of("serve", "--api-keys", "hunter2", "--print-config")
    assert "hunter2" not in capsys.readouterr().out
    status_of("serve", "--api-keys", "hunter2", "--print-config", "--show-secrets")
    assert "hunter2" in capsys.readouterr().out


def test_the_model_may_be_named_either_way() -> None:
    def settings(**flags: object) -> str:
        return serve.settings_of(Namespace(config=None, **flags)).config.engine.model

    assert settings(target="a") == settings(target=None, model="a") == settings(target="a", model="a") == "a"
    with pytest.raises(SettingsError):
        settings(target="a", model="b")


def test_the_version_may_be_asked_for_either_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("version") == status_of("--version") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == f"octavo {octavo_version()}"
    assert status_of("--help") == 0
    assert "--version" in capsys.readouterr().out


def test_a_light_command_imports_nothing_heavy() -> None:
    """Time to the first line of output is import time; torch alone would cost seconds."""
    script = (
        "import sys; from server import cli; cli.main(['version'])\n"
        "heavy = {'torch', 'fastapi', 'pydantic', 'httpx', 'rich', 'zmq', 'numpy', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("octavo ")
    assert second == "[]"


def test_models_lists_what_serve_would_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCTAVO_MODEL", str(tmp_path))
    assert status_of("models") == 0
    starred = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert starred == [f"* {tmp_path}  (file or folder)"]
