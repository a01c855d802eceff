"""A bar on a terminal for loads that take a while; a line in the log for every load."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
import torch

from engine.checkpoint import locate
from engine.weights import progress
from engine.weights.loader import load_weights
from tests.engine.weights.test_loader import tiny_gguf


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, screen: io.StringIO, quiet_s: float) -> str:
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "_QUIET_S", quiet_s)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress_bar("loading weights", 4_000_000) as advance:
        for _ in range(4):
            advance(1_000_000)
    return screen.getvalue()


def test_a_terminal_shows_how_far_a_long_load_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), -1.0)
    assert "loading weights" in text
    assert "4.0/4.0 MB" in text


def test_short_loads_and_files_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), 60.0) == ""
    assert shown(monkeypatch, io.StringIO(), -1.0) == ""


def test_a_load_is_one_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = tiny_gguf(tmp_path)
    with caplog.at_level(logging.INFO, "octavo.engine"):
        weights = load_weights(locate(str(checkpoint.path)), torch.bfloat16, torch.device("cpu"))
    (line,) = (record.getMessage() for record in caplog.records)
    kept = sum(tensor.nbytes for tensor in weights.values()) / 1e6
    assert line.startswith("loaded tiny (GGUF F32, ")
    assert line.endswith(f"{kept:.1f} MB of weights as bfloat16 on cpu")
