"""Tries Octavo with the clients that people have: `make clients`, or `make clients CLIENTS=openai,anthropic`.

Each client is installed into an environment of its own in `.clients/`, and its script is run there against a
server that is started for it; what either says is in `.clients/NAME.log`. A run of all clients writes the table of
verdicts into README.md beside this file; a run of some only prints it. The exit status is 1 where something FAILS.
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
from collections.abc import Iterable, Mapping, Sequence
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
INSTALL_TIMEOUT_S = 1200
SCRIPT_TIMEOUT_S = 1800  # of all calls of a client; one call's is in scripts/calls.py


class CannotBeInstalled(Exception):
    """Says why in one line."""


@dataclass(frozen=True)
class Verdict:
    word: str  # works, refused, cannot, FAILS
    detail: str = ""


@dataclass(frozen=True)
class Result:
    """What came of one client; without verdicts where it could not be installed."""

    client: Client
    version: str = ""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    not_installed: str = ""

    @property
    def fails(self) -> bool:
        return any(verdict.word == "FAILS" for verdict in self.verdicts.values())


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("clients", nargs="?", default="", help="names, separated by commas; none = all")
    names = [name for name in arguments.parse_args().clients.split(",") if name]
    known = {client.name: client for client in CLIENTS}
    if unknown := [name for name in names if name not in known]:
        arguments.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    results = []
    for client in [known[name] for name in names] or CLIENTS:
        print(f"{client.name} ", end="", flush=True)
        results.append(examine(client))
        print(summary(results[-1]), flush=True)
    print("\n" + report(results))
    if not names:
        README.write_text(with_report(README.read_text(encoding="utf-8"), report(results)), encoding="utf-8")
        print(f"written into {README.relative_to(ROOT)}")
    return int(any(result.fails or result.not_installed for result in results))


def examine(client: Client) -> Result:
    """Installs the client and tries it against a server of its own."""
    try:
        command = install(client)
    except CannotBeInstalled as error:
        return Result(client, not_installed=str(error))
    with Daemon("--api-keys", KEY) as daemon:
        return try_calls(client, command, daemon.url, log_of(client))


def try_calls(client: Client, command: Sequence[str], url: str, log: Path) -> Result:
    """Runs the client's script in its environment: what it says becomes verdicts, and what it leaves out FAILS."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "OCTAVO_"))
    }
    environment.pop("PYTHONPATH", None)
    headers = {"Authorization": f"Bearer {KEY}"}
    model = httpx.get(f"{url}/v1/models", headers=headers, timeout=30).json()["data"][0]["id"]
    environment |= ENVIRONMENT | {
        "CLIENT_URL": f"{url}/v1",
        "CLIENT_KEY": KEY,
        "CLIENT_MODEL": model,
        "CLIENT_TOKENIZER": str(tokenizer_folder()),
    }
    said, ended = run_bounded(command, log, SCRIPT_TIMEOUT_S, environment)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"')]
    if not lines or "calls" not in lines[0]:
        return Result(
            client, verdicts={call.name: Verdict("FAILS", f"its script {ended}") for call in CALLS[:1]}
        )
    heard = {line["call"]: Verdict(line["verdict"], line["detail"]) for line in lines[1:] if "call" in line}
    silent = Verdict("FAILS", f"the script {ended} before this call")
    verdicts = {name: heard.get(name, silent) for name in lines[0]["calls"]}
    if strange := set(verdicts) - {call.name for call in CALLS}:
        raise ValueError(f"{client.script} tries calls that the catalogue has not: {sorted(strange)}")
    return Result(client, lines[0]["version"], verdicts)


def run_bounded(
    command: Sequence[str], log: Path, timeout_s: float, environment: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """What the command said, and how it ended. It and all that it started are ended when the time is over."""
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, cwd=ENVIRONMENTS if ENVIRONMENTS.exists() else ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
        ended = ""
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            ended = f"did not end within {timeout_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if ended:
            said, _ = process.communicate()
        errors.write(said)
    return said, ended or f"ended with status {process.returncode}"


def install(client: Client) -> list[str]:
    """The command that runs the client's script, in its environment; made unless it is there already."""
    home = ENVIRONMENTS / client.name
    stamp = home / ".installed"
    wanted = "\n".join([*client.packages, sys.version if not client.in_node else ""])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(home, ignore_errors=True)
        log_of(client).unlink(missing_ok=True)
        home.mkdir(parents=True)
        for step in installation(client, home):
            run_step(step, home, log_of(client))
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


def run_step(step: list[str], home: Path, log: Path) -> None:
    if shutil.which(step[0]) is None:
        raise CannotBeInstalled(f"{step[0]} is not on this machine")
    _, ended = run_bounded(step, log, INSTALL_TIMEOUT_S, {**os.environ, "PYTHON": sys.executable})
    if ended != "ended with status 0":
        shutil.rmtree(home, ignore_errors=True)
        raise CannotBeInstalled(f"{Path(step[0]).name} {ended}, see {log.relative_to(ROOT)}")


def log_of(client: Client) -> Path:
    return ENVIRONMENTS / f"{client.name}.log"


@cache
def tokenizer_folder() -> Path:
    """The default model's tokeniser as Hugging Face would ship it, for clients that count tokens themselves."""
    from tests.engine.weights.folder import write_tokenizer

    folder = ENVIRONMENTS / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    embedded = find_embedded()
    assert embedded is not None, "the package with the default model is not installed"
    write_tokenizer(locate(str(embedded)), folder)
    return folder


def summary(result: Result) -> str:
    if result.not_installed:
        return f"is not installed: {result.not_installed}"
    words = [verdict.word for verdict in result.verdicts.values()]
    counts = [
        f"{words.count(word)} {word}" for word in ("works", "refused", "cannot", "FAILS") if word in words
    ]
    return f"{result.version}: {', '.join(counts)}"


def report(results: Iterable[Result]) -> str:
    """The table, one row per call and one column per client, and why what FAILS does."""
    results = list(results)
    names = [result.client.name for result in results]
    header = [
        "call",
        *(f"{name} {result.version}".strip() for name, result in zip(names, results, strict=True)),
    ]
    rows = [
        [f"`{call.name}`", *(cell(result, call.name) for result in results)]
        for call in CALLS
        if any(call.name in result.verdicts for result in results)
    ]
    node = shutil.which("node")
    node_version = (
        subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
        if node
        else ""
    )
    with_what = f"Python {sys.version.split()[0]}" + (f", Node {node_version.strip()}" if node else "")
    parts = [f"Tried on {datetime.now(UTC):%Y-%m-%d} with {with_what}.", aligned([header, *rows])]
    parts += [
        f"{result.client.name} is not installed: {result.not_installed}."
        for result in results
        if result.not_installed
    ]
    failures = [
        f"- {result.client.name}, `{name}`: {verdict.detail}"
        for result in results
        for name, verdict in result.verdicts.items()
        if verdict.word == "FAILS"
    ]
    return "\n\n".join([*parts, *(["\n".join(failures)] if failures else [])]) + "\n"


def cell(result: Result, call: str) -> str:
    return "?" if result.not_installed else result.verdicts.get(call, Verdict("")).word


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
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
