"""The policies against each other on recorded traces, simulated: machines x traces x batch limits x loads.

    python -m tests.bench.policies [--workers 2] [--limit 4000] [--only "code, 64"] [--machine FILE]

The traces are looked for in $OCTAVO_TRACES (default ../shared/traces). Ratios are to fcfs of the same build.
The table goes to standard output and to tests/bench/results/policies.md, every figure beside it to
policies.json (a megabyte, not kept). Requests longer than the machine's context length are cut to it; the
JSON's notes say how many.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scheduler.config import SchedulerConfig
from scheduler.machine import load_machine
from scheduler.replay.report import compare
from scheduler.replay.run import Shaping, replay
from scheduler.replay.trace import read_trace

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
MACHINES = ("h100-8b", "cpu-2-cores-smollm2-135m")
TRACES = {
    "conversation": "AzureLLMInferenceTrace_conv.csv",
    "code": "AzureLLMInferenceTrace_code.csv",
    "servegen": "servegen_deepseek_r1_1h_derived.csv",
}
BATCHES = (16, 64, 128)
LOADS = (0.7, 0.85, 0.97, "burst")
BURST_BASE_LOAD = 0.85  # of the trace in which the burst comes
POLICIES = ("fcfs", "mlfq", "mlfq-static", "srpt")


@dataclass(frozen=True, slots=True)
class Cell:
    """One machine, trace, batch limit and load."""

    machine: str  # a file
    trace: str
    batch: int
    load: float | str
    limit: int | None

    @property
    def name(self) -> str:
        return f"{Path(self.machine).stem}, {self.trace}, {self.batch}, {self.load}"


def cells(machines: Sequence[str], only: str, limit: int | None) -> Iterator[Cell]:
    for machine in machines:
        for trace in TRACES:
            for batch in BATCHES:
                for load in LOADS:
                    cell = Cell(machine, trace, batch, load, limit)
                    if only in cell.name:
                        yield cell


def measure(cell: Cell) -> dict[str, Any]:
    folder = Path(os.environ.get("OCTAVO_TRACES", ROOT.parent / "shared" / "traces"))
    machine = replace(load_machine(Path(cell.machine)), max_num_seqs=cell.batch)
    shaping = Shaping(
        load=BURST_BASE_LOAD if cell.load == "burst" else float(cell.load),
        burst=cell.load == "burst",
    )
    trace = shaping.apply(read_trace(folder / TRACES[cell.trace], cell.limit), machine, 1)
    reports = [replay(trace, machine, SchedulerConfig(policy=policy)).report for policy in POLICIES]
    return {
        "cell": asdict(cell),
        "name": cell.name,
        "notes": list(trace.notes),
        "policies": [asdict(one) | {"by_tenant": []} for one in reports],
        "compared_with_fcfs": [asdict(one) for one in compare(reports)],
    }


HEADER = (
    "| machine, trace, batch, load | policy | mean completion | p99 | mean TTFT | to srpt "
    "| longest pause, s | mean, s | req/s simulated |"
)


def rows(result: dict[str, Any]) -> Iterator[str]:
    for figures, ratio in zip(result["policies"], result["compared_with_fcfs"], strict=True):
        way = ratio["towards_srpt"]
        yield (
            f"| {result['name']} | {figures['policy']} | {ratio['mean_completion']:.3f} "
            f"| {ratio['p99_completion']:.3f} | {ratio['mean_first_token']:.3f} "
            f"| {'-' if math.isnan(way) else f'{way:.0%}'} | {figures['longest_stream_pause_s']:.1f} "
            f"| {figures['completion_s']['mean']:.2f} | {figures['num_requests'] / figures['wall_s']:,.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=int, help="rows of each trace")
    parser.add_argument(
        "--only", default="", help='cells whose name has this in it, such as "code, 64, 0.97"'
    )
    parser.add_argument("--machine", action="append", help="a machine file; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS / "policies", help="without suffix")
    options = parser.parse_args()
    machines = options.machine or [str(ROOT / "configs" / "machines" / f"{name}.toml") for name in MACHINES]
    table = [HEADER, "|---|---|" + "---:|" * 7]
    print("\n".join(table), flush=True)
    results = []
    with ProcessPoolExecutor(options.workers) as pool:
        for result in pool.map(measure, cells(machines, options.only, options.limit)):
            results.append(result)
            table += rows(result)
            print("\n".join(rows(result)), flush=True)
    about = "Ratios to fcfs of the same build. Made by: python -m tests.bench.policies " + " ".join(
        sys.argv[1:]
    )
    options.out.with_suffix(".md").write_text(about + "\n\n" + "\n".join(table) + "\n", encoding="utf-8")
    # JSON has no NaN, which stands where srpt gains nothing over fcfs.
    text = json.dumps(results, indent=1).replace(": NaN", ": null")
    options.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
