"""The openai packages, and the runner that tries all clients (`make clients`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import run
from tests.clients.catalogue import CALLS, CLIENTS, Client
from tests.e2e.daemon import Daemon

BY_NAME = {client.name: client for client in CLIENTS}
NPM_TIMEOUT_S = 120
SCRIPT_TIMEOUT_S = 600  # a minute where nothing else runs
FAKE = Client("fake", (), "use_fake.py")


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with Daemon("--api-keys", run.KEY) as daemon:
        yield run.environment_for(daemon.url)


def documented() -> dict[str, dict[str, str]]:
    """README's verdicts, by client and call; what was not tried is left out."""
    text = run.README.read_text(encoding="utf-8").split(run.BEGIN)[1].split(run.END)[0]
    table = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("| ")]
    header, *rows = [[word.strip(" `") for word in line.strip("|").split("|")] for line in table]
    return {
        name.split()[0]: {row[0]: row[column] for row in rows if row[column]}
        for column, name in enumerate(header)
        if column
    }


def as_told(result: run.Result) -> dict[str, str]:
    return {name: verdict.word for name, verdict in result.verdicts.items()}


def test_the_table_has_every_client_and_every_call() -> None:
    table = documented()
    assert list(table) == [client.name for client in CLIENTS]
    assert {name for column in table.values() for name in column} == {call.name for call in CALLS}


@pytest.mark.timeout(SCRIPT_TIMEOUT_S + 200)
def test_the_openai_package_gets_what_the_table_says(environment: dict[str, str], tmp_path: Path) -> None:
    client = BY_NAME["openai"]
    command = [sys.executable, str(run.FOLDER / "scripts" / client.script)]
    result = run.try_calls(client, command, environment, tmp_path / "log", SCRIPT_TIMEOUT_S)
    assert result.failures == []
    assert as_told(result) == documented()["openai"]


@pytest.mark.timeout(SCRIPT_TIMEOUT_S + 200)
def test_the_openai_package_of_node_gets_what_the_table_says(
    environment: dict[str, str], tmp_path: Path
) -> None:
    client = BY_NAME["openai-node"]
    try:
        command = run.install(client, tmp_path / "install.log", NPM_TIMEOUT_S)
    except run.CannotBeInstalled as error:
        pytest.skip(str(error))
    result = run.try_calls(client, command, environment, tmp_path / "log", SCRIPT_TIMEOUT_S)
    assert result.failures == []
    assert as_told(result) == documented()["openai-node"]


SCRIPT = """
import calls
from calls import Calls

calls.CALL_TIMEOUT_S = 1
call = Calls("pytest")

@call
def chat(): ...

@call
def stream():
    assert "an answer" == "another"

@call.or_refused(KeyError, "response_format")
def json_schema():
    raise KeyError("param: response_format")

@call.or_refused(KeyError, "tool_choice")
def tool_choice():
    raise KeyError("a server error")

@call.or_refused(KeyError, "structured_outputs")
def constraint():
    assert "prose" in ("yes", "no")

@call.or_refused(KeyError, "/v1/embeddings")
def embeddings(): ...

@call
def timeout():
    with calls.raises(ValueError, "late"):
        pass

@call
def async_():
    while True:
        pass

call.cannot(messages="not its interface")
call.run()
"""


def try_script(tmp_path: Path, text: str, timeout_s: float = 60) -> run.Result:
    (tmp_path / "script.py").write_text(text)
    places = {
        "PYTHONPATH": str(run.FOLDER / "scripts"),
        "CLIENT_URL": "",
        "CLIENT_KEY": "",
        "CLIENT_MODEL": "",
    }
    command = [sys.executable, str(tmp_path / "script.py")]
    return run.try_calls(FAKE, command, places, tmp_path / "log", timeout_s)


def test_only_a_right_answer_works_and_only_the_documented_refusal_is_one(tmp_path: Path) -> None:
    assert as_told(try_script(tmp_path, SCRIPT)) == {
        "chat": "works",
        "stream": "FAILS",
        "json_schema": "refused",
        "tool_choice": "FAILS",  # refused for another reason than the documented one
        "constraint": "FAILS",  # dropped without a word
        "embeddings": "works",  # kept by now
        "timeout": "FAILS",  # no error came
        "async": "FAILS",  # without end
        "messages": "cannot",
    }


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("import os; os._exit(3)", "ended with status 3"),
        ("import time; time.sleep(600)", "did not end within 5 s"),
    ],
)
def test_the_calls_that_a_script_does_not_come_to_fail(end: str, told: str, tmp_path: Path) -> None:
    begun = 'print(\'{"version": "1", "calls": ["chat", "n"]}\', flush=True)\n'
    begun += 'print(\'{"call": "chat", "verdict": "works", "detail": ""}\', flush=True)\n'
    result = try_script(tmp_path, begun + end, timeout_s=5)
    assert as_told(result) == {"chat": "works", "n": "FAILS"}
    assert result.failures == [f"fake, `n`: the script {told} before this call's end"]
    assert try_script(tmp_path, end, timeout_s=5).failures == [
        f"fake: its script {told} before its first call, see its log"
    ]


def test_a_client_that_cannot_be_installed_does_not_keep_others_from_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ENVIRONMENTS", tmp_path / "clients")
    result = run.examine(Client("broken", (str(tmp_path / "absent"),), "use_openai.py"))
    assert result.failures[0].startswith("broken: is not installed: ")
    assert "| ? " in run.report([result])
    monkeypatch.setattr(run.shutil, "which", lambda _: None)
    assert "npm is not on this machine" in run.examine(Client("odd", (), "use_openai.mjs")).failures[0]


def test_the_report_takes_the_place_of_the_last_one() -> None:
    told = run.report([run.Result(FAKE, "1.0", {"chat": run.Verdict("FAILS", "why\nnot")})])
    text = run.with_report(run.with_report(f"a\n{run.BEGIN}{run.END}\nb", told), told)
    assert text == f"a\n{run.BEGIN}{told}{run.END}\nb"
    assert "- fake, `chat`: why not" in told
