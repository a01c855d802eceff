"""Measure an OpenAI-compatible server.

Time to first token, inter-token latency, completion time and throughput under named workloads or a
trace of arrivals. Greedy, end-of-text ignored, streamed; prompts are random words from --seed. A
prompt that the server has seen may hit its prefix cache: take another --seed for a second run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.commands import CommandError
from server.commands.connection import add_connection
from server.commands.numbers import positive_float, positive_int

if TYPE_CHECKING:
    import argparse

    from server.bench.workloads import Workload

WORKLOADS = ("A", "B", "C", "D", "E", "all", "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_connection(parser)
    parser.add_argument(
        "--start",
        action="store_true",
        help="start `octavo serve MODEL` on a free port for the measurement instead of using --url",
    )
    load = parser.add_argument_group(
        "load",
        "A: 1 client, 128 in 128 out. B: 8 at once. C: 32 at once. D: 4 at once, 1024 in 16 out. "
        "E: 24 sent at once, four in five ask for 16 tokens, one in five for 512. trace: --trace FILE.",
    )
    load.add_argument("--workload", choices=WORKLOADS, default="all", help="(default all = A to E)")
    load.add_argument(
        "--requests", type=positive_int, metavar="N", help="requests, instead of the workload's own number"
    )
    load.add_argument(
        "--api", choices=("completions", "chat"), default="completions", help="(default completions)"
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default 0)")
    load.add_argument("--no-keepalive", action="store_true", help="one connection per request")
    load.add_argument(
        "--timeout", type=positive_float, default=600.0, metavar="SECONDS", help="per request (default 600)"
    )
    load.add_argument(
        "--json", type=Path, metavar="FILE", help="write machine, command and raw figures there"
    )
    trace = parser.add_argument_group(
        "trace", "Azure (csv), ServeGen-derived (csv) or Mooncake (jsonl) files"
    )
    trace.add_argument("--trace", type=Path, metavar="FILE", help="arrival times, input and output lengths")
    trace.add_argument(
        "--time-scale", type=positive_float, default=1.0, metavar="X", help="multiplies arrival times"
    )
    trace.add_argument("--max-input", type=positive_int, metavar="N", help="clip prompts to N tokens")
    trace.add_argument("--max-output", type=positive_int, metavar="N", help="clip outputs to N tokens")
    trace.add_argument("--num-requests", type=positive_int, metavar="N", help="the first N rows only")


def run(args: argparse.Namespace) -> int:
    from server.bench.run import BenchError, BenchOptions, run_bench
    from server.bench.trace import TraceError

    options = BenchOptions(
        url=args.url,
        api_key=args.api_key,
        model=args.model,
        start=args.start,
        api=args.api,
        seed=args.seed,
        keep_alive=not args.no_keepalive,
        timeout_s=args.timeout,
        json_path=args.json,
    )
    try:
        return run_bench(_workloads(args), options)
    except (BenchError, TraceError) as error:
        raise CommandError(str(error)) from None


def _workloads(args: argparse.Namespace) -> list[Workload]:
    from server.bench.trace import read_trace
    from server.bench.workloads import NAMED, named

    if args.workload != "trace":
        return [named(name, args.requests) for name in (NAMED if args.workload == "all" else [args.workload])]
    if args.trace is None:
        raise CommandError("--workload trace needs --trace FILE")
    return [
        read_trace(
            args.trace,
            time_scale=args.time_scale,
            max_input=args.max_input,
            max_output=args.max_output,
            num_requests=args.num_requests or args.requests,
        )
    ]
