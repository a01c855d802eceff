"""Runs a simulation per policy, and shows what came out: a table for people, JSON with every figure."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from scheduler.replay.report import compare
from scheduler.replay.run import Shaping, replay
from server.bench.plots import plot_waiting, require_matplotlib
from server.bench.report import machine as this_machine
from server.bench.report import say, without_nan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from scheduler.config import SchedulerConfig
    from scheduler.machine import Machine
    from scheduler.replay.report import ClassReport, Report, Spread
    from scheduler.replay.run import Replayed
    from scheduler.replay.trace import Trace

MAX_SHOWN_TENANTS = 5
MAX_TABLE_WIDTH = 1000  # columns
PROGRESS_STRIDE = 256  # requests between two movements of the bar


class SimulationError(Exception):
    """The figures cannot be written. The text is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    machine: Machine
    config: SchedulerConfig  # knobs of the policies; its `policy` is not used
    policies: tuple[str, ...]
    shaping: Shaping = field(default_factory=Shaping)
    machines: int = 1
    routing: str = "least-work"
    json_path: Path | None = None
    plot_path: Path | None = None


def run_simulation(trace: Trace, options: SimulationOptions) -> list[Replayed]:
    """Simulate, print, write. Raises LoadError, PlotError, SimulationError."""
    from rich.console import Console

    if options.plot_path:
        require_matplotlib()
    shaped = options.shaping.apply(trace, options.machine, options.machines)
    runs = _replay_all(shaped, options, Console(stderr=True))
    print_tables(Console(), shaped, options, [run.report for run in runs])
    if options.json_path:
        _write(options.json_path, as_json(shaped, options, [run.report for run in runs]))
    if options.plot_path:
        plot_waiting(options.plot_path, _about(shaped, options), runs)
    return runs


def _replay_all(trace: Trace, options: SimulationOptions, console: Console) -> list[Replayed]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = []
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as bar:
        for policy in options.policies:
            task = bar.add_task(policy, total=len(trace.requests))
            moved = _every(PROGRESS_STRIDE, lambda task=task: bar.advance(task, PROGRESS_STRIDE))  # type: ignore[misc]
            runs.append(
                replay(
                    trace,
                    options.machine,
                    replace(options.config, policy=policy),
                    machines=options.machines,
                    routing=options.routing,
                    on_finish=moved,
                )
            )
            bar.update(task, completed=len(trace.requests))
    return runs


def _every(stride: int, act: Callable[[], object]) -> Callable[[], None]:
    count = 0

    def one_more() -> None:
        nonlocal count
        count += 1
        if count % stride == 0:
            act()

    return one_more


def _write(path: Path, figures: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SimulationError(f"cannot write {path}: {error.strerror}") from None


def as_json(trace: Trace, options: SimulationOptions, reports: Sequence[Report]) -> dict[str, Any]:
    """What someone needs who wants to repeat the simulation. All times in seconds."""
    knobs = asdict(options.config)
    del knobs["policy"]
    figures = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "simulated_on": this_machine(),
        "command": shlex.join(["octavo", *sys.argv[1:]]),
        "trace": {"name": trace.name, "requests": len(trace.requests), "notes": list(trace.notes)},
        "machine": asdict(options.machine),
        "machines": options.machines,
        "routing": options.routing,
        "knobs": knobs,
        "policies": [asdict(one) | {"requests_per_s": one.requests_per_s} for one in reports],
        "compared_with_fcfs": [asdict(one) for one in compare(reports)],
    }
    return without_nan(figures)  # type: ignore[no-any-return]


def _about(trace: Trace, options: SimulationOptions) -> str:
    count = f"{options.machines} x " if options.machines > 1 else ""
    notes = "".join(f"; {note}" for note in trace.notes)
    batch = f"at most {options.machine.max_num_seqs} sequences a step"
    return f"{trace.name}, {len(trace.requests):,} requests{notes}; {count}{options.machine.name}, {batch}"


def print_tables(
    console: Console, trace: Trace, options: SimulationOptions, reports: Sequence[Report]
) -> None:
    """One row per policy; below it classes of length, and the tenants that had most service."""
    say(console, _about(trace, options))
    tables = [_policies(reports)]
    tables += [_classes("output", "by_output", reports), _classes("input", "by_input", reports)]
    if reports[0].by_tenant:
        tables.append(_tenants(reports))
    for table in tables:
        wanted = console.measure(table, options=console.options.update(width=MAX_TABLE_WIDTH)).maximum
        console.width = max(console.width, wanted)  # a narrow terminal wraps rows: better than cut figures
        console.print(table)


def _table(caption: str, *headings: str) -> Table:
    from rich.table import Table

    table = Table(caption=caption, caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    return table


def _policies(reports: Sequence[Report]) -> Table:
    table = _table(
        "mean / p50 / p99 in s; vs fcfs: mean, p99 completion; mean TTFT; to srpt: share of the way to it",
        *("policy", "completion", "TTFT", "vs fcfs", "to srpt", "preempted: place, pages", "computed twice"),
        *("pages out, in, lost", "longest pause", "busy", "simulated/s"),
    )
    compared = {one.policy: one for one in compare(reports)}
    for one in reports:
        ratio = compared.get(one.policy)
        table.add_row(
            one.policy,
            _spread(one.completion_s),
            _spread(one.first_token_s),
            f"{ratio.mean_completion:.3f} / {ratio.p99_completion:.3f}, {ratio.mean_first_token:.3f}"
            if ratio
            else "-",
            "-" if ratio is None or math.isnan(ratio.towards_srpt) else f"{ratio.towards_srpt:.0%}",
            f"{one.preempted_for_place:,}, {one.preempted_for_pages:,}",
            f"{one.recomputed_tokens:,} ({one.recomputed_tokens / one.computed_tokens:.2%})",
            f"{one.pages_out:,}, {one.pages_in:,}, {one.pages_lost:,}",
            f"{one.longest_stream_pause_s:.1f} s",
            f"{one.utilisation:.1%}",
            f"{one.requests_per_s:,.0f}",
        )
    return table


def _classes(name: str, field: str, reports: Sequence[Report]) -> Table:
    """All policies replay the same requests, so their classes are the same."""
    policies = [one.policy for one in reports]
    table = _table("mean completion, p99; mean TTFT in s", f"{name} tokens", "requests", *policies)
    for row in zip(*(getattr(one, field) for one in reports), strict=True):
        some: ClassReport = row[0]
        cells = (
            f"{one.completion_s.mean:.2f}, {one.completion_s.p99:.2f}; {one.first_token_s.mean:.2f}"
            for one in row
        )
        table.add_row(f"{some.least:,} - {some.most:,}", f"{some.num_requests:,}", *cells)
    return table


def _tenants(reports: Sequence[Report]) -> Table:
    policies = [one.policy for one in reports]
    count = len(reports[0].by_tenant)
    caption = (
        f"mean completion in s; the {min(MAX_SHOWN_TENANTS, count)} of {count} tenants with most service"
    )
    table = _table(caption, "tenant", "requests", "service", *policies)
    by_name = [{tenant.tenant: tenant for tenant in one.by_tenant} for one in reports]
    for some in reports[0].by_tenant[:MAX_SHOWN_TENANTS]:
        means = (f"{names[some.tenant].completion_s.mean:.2f}" for names in by_name)
        table.add_row(some.tenant, f"{some.num_requests:,}", f"{some.share:.1%}", *means)
    return table


def _spread(spread: Spread) -> str:
    return f"{spread.mean:.2f} / {spread.p50:.2f} / {spread.p99:.2f}"
