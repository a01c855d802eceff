"""Runs workloads one after another against a server."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.bench.client import FAILURES, Client, Outcome
from server.bench.http import HttpError, Target
from server.bench.own_server import OwnServer, StartError
from server.bench.prompts import calibrate
from server.bench.report import Measured, as_json, print_table, say
from server.bench.workloads import Job, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

WARM_UP = Job(input_tokens=16, output_tokens=4)


class BenchError(Exception):
    """Nothing could be measured. The text is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """`start` = serve `model` ourselves; otherwise `model` is the id to ask `url` for, or empty."""

    url: str
    api_key: str = ""
    model: str = ""
    start: bool = False
    api: str = "completions"
    seed: int = 0
    keep_alive: bool = True
    timeout_s: float = 600.0
    json_path: Path | None = None


def run_bench(workloads: Sequence[Workload], options: BenchOptions) -> int:
    """Measure, print, write. The status is 1 when any request failed. Raises BenchError."""
    from rich.console import Console

    try:
        about, results = asyncio.run(_measure_all(workloads, options, Console(stderr=True)))
    except StartError as error:
        raise BenchError(str(error)) from None
    except FAILURES as error:
        raise BenchError(f"cannot measure {options.url}: {error or type(error).__name__}") from None
    console = Console()
    say(console, f"{about['server']['model']} at {about['url']}, version {about['server']['version']}")
    print_table(console, results)
    if options.json_path:
        _write(options.json_path, as_json(results, **about))
    return 1 if any(result.summary.num_errors for result in results) else 0


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None


async def _measure_all(
    workloads: Sequence[Workload], options: BenchOptions, console: Console
) -> tuple[dict[str, Any], list[Measured]]:
    async with AsyncExitStack() as stack:
        url = options.url
        if options.start:
            url = (await stack.enter_async_context(OwnServer(options.model))).url
        client = _client(url, options)
        stack.callback(client.close)
        client.model = client.model or await _first_model(client)
        maker = await calibrate(client)
        await _warm_up(client, await maker.make(random.Random("warm up"), WARM_UP.input_tokens))
        results = []
        for workload in workloads:
            # A seed of its own per workload: none finds another's prompts in the prefix cache.
            rng = random.Random(f"{options.seed}/{workload.name}")
            prompts = [await maker.make(rng, job.input_tokens) for job in workload.jobs]
            results.append(Measured(workload, await _run_shown(client, workload, prompts, console)))
        about = {
            "url": url,
            "server": {"model": client.model, "version": await _version(client)},
            "api": options.api,
            "seed": options.seed,
            "keep_alive": options.keep_alive,
            "prompt_lengths_by": maker.calibration,
        }
    return about, results


def _client(url: str, options: BenchOptions) -> Client:
    return Client(
        Target.of(url, options.api_key),
        model="" if options.start else options.model,
        api=options.api,
        keep_alive=options.keep_alive,
        timeout_s=options.timeout_s,
    )


async def _first_model(client: Client) -> str:
    models = (await client.call("GET", "/v1/models")).get("data") or []
    if not models:
        raise HttpError("it lists no model")
    return str(models[0]["id"])


async def _version(client: Client) -> str:
    """The server's own word, where it has a /version."""
    try:
        return str((await client.call("GET", "/version"))["version"])
    except (*FAILURES, KeyError, TypeError):
        return "unknown"


async def _warm_up(client: Client, prompt: str) -> None:
    """One request that is not counted: it also shows at once what would fail for all of them."""
    outcome = await client.measure(WARM_UP, prompt)
    if outcome.error:
        raise HttpError(f"the warm-up request failed: {outcome.error}")


async def _run_shown(
    client: Client, workload: Workload, prompts: Sequence[str], console: Console
) -> list[Outcome]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn twice a second: the bar's thread shares the interpreter with the measurement.
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as bar:
        task = bar.add_task(workload.name, total=len(prompts))
        return await run_workload(client, workload, prompts, lambda: bar.advance(task))


async def run_workload(
    client: Client, workload: Workload, prompts: Sequence[str], on_done: Callable[[], object]
) -> list[Outcome]:
    """Send every job; the outcomes come in the order of the jobs."""
    outcomes: list[Outcome | None] = [None] * len(prompts)

    async def send(index: int) -> None:
        outcomes[index] = await client.measure(workload.jobs[index], prompts[index])
        on_done()

    async def one_after_another() -> None:
        for index in remaining:
            await send(index)

    async def at_its_time(index: int) -> None:
        await asyncio.sleep(workload.jobs[index].at_s)
        await send(index)

    async with asyncio.TaskGroup() as group:
        if workload.concurrency is None:
            for index in range(len(prompts)):
                group.create_task(at_its_time(index))
        else:
            remaining = iter(range(len(prompts)))  # shared: each client takes the next job
            for _ in range(workload.concurrency):
                group.create_task(one_after_another())
    return [outcome for outcome in outcomes if outcome is not None]
