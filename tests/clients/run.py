"""Tries Octavo with the clients that people have: `make clients`, or `make clients CLIENTS=openai,anthropic`.

Each client is installed into an environment of its own in `.clients/`, and its script is run there against a
server that is started for it; what they say is in `.clients/NAME.log`. A run of all clients writes the table
of verdicts into README.md beside this file; a run of some only prints it. Status 1: something FAILS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import httpx

from engine.checkpoint import locate
from engine.weights.embedded import find_embedded
from tests.clients.catalogue import CALLS, CLIENTS, ENVIRONMENT, Client
from tests.e2e.daemon import ROOT, Daemon

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
BEGIN, END = "<!-- verdicts: make clients -->\n", "<!-- end of verdicts -->"
ENVIRONMENTS = ROOT / ".clients"
KEY = "sesame"
INSTALL_TIMEOUT_S = 1200  # of each step
SCRIPT_TIMEOUT_S = 1800  # of all calls of a client; scripts/calls.py bounds each


class CannotBeInstalled(Exception):
    """Says why in one line."""


@dataclass(frozen=True)
class Verdict:
    word: str  # works, refused, cannot, FAILS
    detail: str = ""


@dataclass(frozen=True)
class Result:
    """What came of one client: verdicts by call, or why there are none."""

    client: Client
    version: str = ""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    trouble: str = ""

    @property
    def failures(self) -> list[str]:
        told = [(name, verdict.detail) for name, verdict in self.verdicts.items() if verdict.word == "FAILS"]
        of_calls = [f"{self.client.name}, `{name}`: {' '.join(detail.split())}" for name, detail in told]
        return of_calls or ([f"{self.client.name}: {self.trouble}"] if self.trouble else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="?", default="", help="names, separated by commas; none = all")
    names = [name.strip() for name in parser.parse_args().clients.split(",") if name.strip()]
    known = {client.name: client for client in CLIENTS}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    results = []
    for client in [known[name] for name in names] or CLIENTS:
        print(f"{client.name} ", end="", flush=True)
        results.append(examine(client))
        print(summary(results[-1]), flush=True)
    print(f"\n{report(results)}")
    if not names:
        README.write_text(with_report(README.read_text(encoding="utf-8"), report(results)), encoding="utf-8")
        print(f"Written into {README.relative_to(ROOT)}.")
    return int(any(result.failures for result in results))


def examine(client: Client) -> Result:
    """Installs the client and tries it. Nothing that happens to it keeps the next one from its turn."""
    log = ENVIRONMENTS / f"{client.name}.log"
    try:
        command = install(client, log)
        with Daemon("--api-keys", KEY) as daemon:
            return try_calls(client, command, environment_for(daemon.url), log)
    except CannotBeInstalled as error:
        return Result(client, trouble=f"is not installed: {error}")
    except Exception as error:  # a server that does not start, a script that breaks its word
        return Result(client, trouble=f"is not tried: {type(error).__name__}: {error}")


def try_calls(
    client: Client,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    timeout_s: float = SCRIPT_TIMEOUT_S,
) -> Result:
    """What the client's script says, as verdicts. What it announces and then does not say FAILS."""
    said, ended = run_bounded(command, log, timeout_s, environment)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"')]
    if not lines or "calls" not in lines[0]:
        return Result(client, trouble=f"its script {ended} before its first call, see its log")
    announced = lines[0]["calls"]
    heard = {line["call"]: Verdict(line["verdict"], line["detail"]) for line in lines[1:] if "call" in line}
    if strange := (set(announced) | set(heard)) - {call.name for call in CALLS}:
        raise ValueError(f"{client.script} tries calls that the catalogue has not: {sorted(strange)}")
    silent = Verdict("FAILS", f"the script {ended} before this call's end")
    return Result(client, lines[0]["version"], {name: heard.get(name, silent) for name in announced})


def environment_for(url: str) -> dict[str, str]:
    """Of a script: where the server is, and nothing that would send its client elsewhere."""
    answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
    ours = ("OPENAI_", "ANTHROPIC_", "OCTAVO_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
        **ENVIRONMENT,
        "CLIENT_URL": f"{url}/v1",
        "CLIENT_KEY": KEY,
        "CLIENT_MODEL": answer.json()["data"][0]["id"],
        "CLIENT_TOKENIZER": str(tokenizer_folder()),
    }


def run_bounded(
    command: Sequence[str], log: Path, timeout_s: float, environment: Mapping[str, str]
) -> tuple[str, str]:
    """What the command says, and how it ends. With it ends all that it started."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            cwd=ENVIRONMENTS,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=timeout_s)
            ended = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"did not end within {timeout_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None:
            said, _ = process.communicate()
        errors.write(said)
    return said, ended


def install(client: Client, log: Path, timeout_s: float = INSTALL_TIMEOUT_S) -> list[str]:
    """The command that runs the client's script, in an environment that is made unless it is there.

    Raises CannotBeInstalled.
    """
    home = ENVIRONMENTS / client.name
    stamp = home / ".installed"
    wanted = "\n".join([*client.packages, "" if client.in_node else sys.version])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        for step in installation(client, home):
            run_step(step, log, timeout_s)
        stamp.write_text(wanted, encoding="utf-8")
    if client.in_node:
        # Node looks for packages beside the script.
        for script in (FOLDER / "scripts").glob("*.mjs"):
            shutil.copy(script, home)
        return ["node", str(home / client.script)]
    return [str(home / "bin" / "python"), str(FOLDER / "scripts" / client.script)]


def installation(client: Client, home: Path) -> list[list[str]]:
    if client.in_node:
        return [["npm", "install", "--prefix", str(home), "--no-audit", "--no-fund", *client.packages]]
    steps = [[sys.executable, "-m", "venv", str(home)]]
    if client.needs_torch:
        steps.append([str(ROOT / "docker" / "install.sh"), str(home), "--torch-only"])
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    return [*steps, [*pip, *client.packages]]


def run_step(step: list[str], log: Path, timeout_s: float) -> None:
    if shutil.which(step[0]) is None:
        raise CannotBeInstalled(f"{step[0]} is not on this machine")
    _, ended = run_bounded(step, log, timeout_s, {**os.environ, "PYTHON": sys.executable})
    if ended != "ended with status 0":
        raise CannotBeInstalled(f"{' '.join(step[:4])} {ended}, see {log}")


@cache
def tokenizer_folder() -> Path:
    """The default model's tokeniser as Hugging Face would ship it, for clients that count tokens."""
    from tests.engine.weights.folder import write_tokenizer  # imports torch

    folder = ENVIRONMENTS / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    embedded = find_embedded()
    assert embedded is not None, "the package with the default model is not installed"
    write_tokenizer(locate(str(embedded)), folder)
    return folder


def summary(result: Result) -> str:
    if result.trouble:
        return result.trouble
    words = [verdict.word for verdict in result.verdicts.values()]
    counts = {word: words.count(word) for word in ("works", "refused", "cannot", "FAILS")}
    return f"{result.version}: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def report(results: Sequence[Result]) -> str:
    """A row per call and a column per client; then what the calls are, and why what FAILS does."""
    header = ["call", *(f"{result.client.name} {result.version}".rstrip() for result in results)]
    rows = [[f"`{call.name}`", *(cell(result, call.name) for result in results)] for call in CALLS]
    meanings = [[f"`{call.name}`", call.meaning, call.refusal] for call in CALLS]
    parts = [
        f"Tried on {datetime.now(UTC):%Y-%m-%d} with {', '.join(languages())}.",
        aligned([header, *rows]),
        aligned([["call", "what is asked", "refused by"], *meanings]),
        *("\n".join(f"- {failure}" for failure in result.failures) for result in results if result.failures),
    ]
    return "\n\n".join(parts) + "\n"


def languages() -> list[str]:
    node = ["node", "--version"]
    told = (
        subprocess.run(node, capture_output=True, text=True, check=False).stdout
        if shutil.which("node")
        else ""
    )
    return [f"Python {sys.version.split()[0]}", *([f"Node {told.strip()}"] if told else [])]


def cell(result: Result, call: str) -> str:
    verdict = result.verdicts.get(call)
    return verdict.word if verdict else "?" if result.trouble else ""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def with_report(text: str, report: str) -> str:
    """README's text with the report between its markers. Raises ValueError where a marker lacks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{report}{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
