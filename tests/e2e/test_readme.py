"""The first requests of README.md work as they are printed, against a running server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
DEFAULT_URL = "http://127.0.0.1:8000"
BLOCKS = [
    (language, body)
    for language, body in re.findall(r"^```(bash|python)\n(.*?)^```$", README, re.M | re.S)
    if DEFAULT_URL in body
]


class LiveServer(Protocol):
    url: str


def test_there_are_examples_of_both_kinds() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.parametrize(("language", "body"), BLOCKS, ids=[f"{i}-{b[0]}" for i, b in enumerate(BLOCKS)])
def test_an_example_runs_and_prints_something(language: str, body: str, live_server: LiveServer) -> None:
    script = body.replace(DEFAULT_URL, live_server.url)
    if language == "bash":
        # As printed, but an HTTP error is a failure.
        command = ["bash", "-euo", "pipefail", "-c", re.sub(r"\bcurl ", "curl -sS --fail-with-body ", script)]
    else:
        command = [sys.executable, "-c", script]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
