"""`octavo serve` up to the point where it serves: what fails there leaves nothing behind."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

import engine.client
from server import cli

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[engine.client.EngineProcess]:
    """Every engine process that was spawned."""
    spawned: list[engine.client.EngineProcess] = []
    spawn = engine.client.EngineProcess.spawn

    def recorded(self: engine.client.EngineProcess) -> None:
        spawned.append(self)
        spawn(self)

    monkeypatch.setattr(engine.client.EngineProcess, "spawn", recorded)
    return spawned


def test_port_in_use_is_one_line_before_an_engine_is_spawned(
    engines: list[engine.client.EngineProcess], smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(smollm2_gguf), "--port", str(port)]) == 1
    message = f"octavo serve: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert capsys.readouterr().err == message
    assert engines == []


def test_a_checkpoint_without_usable_text_ends_the_engine_at_once(
    engines: list[engine.client.EngineProcess], smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["serve", str(smollm2_gguf), "--port", "0", "--chat-template", "/absent.jinja"])
    assert status == 1
    assert "chat_template /absent.jinja" in capsys.readouterr().err
    assert len(engines) == 1
    assert engines[0].pid is None


def test_an_engine_that_cannot_be_started_is_one_line(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    assert cli.main(["serve", str(smollm2_gguf), "--port", "0"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("octavo serve: the engine cannot be reached: ")
    assert message.count("\n") == 1
