"""Two policies on the real engine, side by side: workload E and pieces of the Azure traces near saturation.

    python -m tests.bench.real_policies [--policies fcfs,mlfq] [--rounds 2] [--max-num-seqs 8]

Timings of one machine drift, so the policies take turns: every round runs every workload under each of
them, on a fresh daemon, with prompts that differ from round to round. Ratios are of means over the rounds.
With more places than requests nothing has to be decided; `--max-num-seqs` makes them scarce. Traces are
looked for in $OCTAVO_TRACES (default ../shared/traces). What was learned is kept between rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.daemon import ROOT, Daemon

RESULT = Path(__file__).parent / "results" / "real_policies.json"
TRACES = Path(os.environ.get("OCTAVO_TRACES", ROOT.parent / "shared" / "traces"))


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    flags: tuple[str, ...]


def trace(name: str, file: str, scale: float, max_input: int, max_output: int, count: int) -> Load:
    sizes = ("--max-input", str(max_input), "--max-output", str(max_output), "--num-requests", str(count))
    flags = ("--workload", "trace", "--trace", str(TRACES / file), "--time-scale", str(scale), *sizes)
    return Load(f"{name} x {scale:g}, at most {max_input} in and {max_output} out, {count} requests", flags)


LOADS = (
    Load("E", ("--workload", "E")),
    trace("conversation", "AzureLLMInferenceTrace_conv.csv", 6.0, 384, 64, 60),
    trace("code", "AzureLLMInferenceTrace_code.csv", 3.0, 1024, 64, 40),
)


def measure(load: Load, policy: str, seed: int, places: int, folder: Path) -> dict[str, Any]:
    """-> the summary that `octavo bench` writes, and the short requests' mean completion where it has them"""
    flags = ("--policy", policy, "--max-num-seqs", str(places), "--state-folder", str(folder / policy))
    with Daemon(*flags) as daemon:
        path = folder / "run.json"
        command = [sys.executable, "-m", "server.cli", "bench", "--url", daemon.url, "--seed", str(seed)]
        subprocess.run(
            [*command, *load.flags, "--json", str(path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
    (workload,) = json.loads(path.read_text())["workloads"]
    summary: dict[str, Any] = workload["summary"]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default="fcfs,mlfq")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    asked = parser.parse_args()
    policies = asked.policies.split(",")
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.rounds):
            order = policies if seed % 2 == 0 else policies[::-1]
            for load in LOADS:
                for policy in order:
                    found = measure(load, policy, seed, asked.max_num_seqs, Path(folder))
                    runs.setdefault(load.name, {}).setdefault(policy, []).append(found)
                    print(f"{seed} {load.name} {policy}: {_line(found)}", flush=True)
    RESULT.write_text(json.dumps({"command": sys.argv, "runs": runs}, indent=1) + "\n")
    for name, by_policy in runs.items():
        base = by_policy[policies[0]]
        for policy in policies[1:]:
            ratios = {label: _mean(by_policy[policy], *keys) / _mean(base, *keys) for label, keys in FIGURES}
            shown = ", ".join(f"{label} {ratio:.3f}" for label, ratio in ratios.items())
            print(f"{name}: {policy} over {policies[0]}: {shown}")


FIGURES = (
    ("mean completion", ("completion_s", "mean")),
    ("p99 completion", ("completion_s", "p99")),
    ("mean time to first token", ("ttft_s", "mean")),
    ("throughput", ("output_tokens_per_s",)),
)


def _mean(summaries: list[dict[str, Any]], *keys: str) -> float:
    return statistics.mean(_value(summary, *keys) for summary in summaries)


def _value(summary: Any, *keys: str) -> float:
    for key in keys:
        summary = summary[key]
    return float(summary)


def _line(summary: dict[str, Any]) -> str:
    figures = ", ".join(f"{label} {_value(summary, *keys):.2f}" for label, keys in FIGURES)
    short = summary["completion_by_label_s"].get("short")
    return figures + (f", short completion {short['mean']:.2f}" if short else "")


if __name__ == "__main__":
    main()
