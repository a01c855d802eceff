"""Replay a trace against policies, on a simulated machine.

Which policy serves this traffic best, and what would 64 machines make of it? Nothing is computed: the
policies of the real scheduler decide, and steps last what the machine file says. The table shows seconds;
--json has every figure, --plot shows waiting against the size of requests for the first two policies.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING

from scheduler.config import POLICIES
from server.commands import CommandError
from server.commands.numbers import positive_float, positive_int

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        type=Path,
        metavar="TRACE",
        help="Azure, ServeGen-derived or generic (arrival, input, output) csv, or Mooncake jsonl",
    )
    parser.add_argument(
        "--machine",
        type=Path,
        required=True,
        metavar="FILE",
        help="costs and limits (configs/machines/*.toml)",
    )
    parser.add_argument(
        "--policy",
        type=_policies,
        default=("mlfq", "fcfs"),
        metavar="A,B",
        help=f"of {', '.join(POLICIES)} (default mlfq,fcfs); srpt alone is told the lengths",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--load",
        type=positive_float,
        metavar="X",
        help="scale arrival times: at 1 they last as long as the machines need to serve all of it "
        "under fcfs (default: times as they are)",
    )
    load.add_argument("--burst", action="store_true", help="twice the capacity for one minute in the middle")
    load.add_argument("--limit", type=positive_int, metavar="N", help="the first N rows only")
    load.add_argument("--divide-lengths", type=positive_float, default=1.0, metavar="X", help="in and out")
    load.add_argument("--clip-output", type=positive_int, metavar="N", help="tokens")
    machines = parser.add_argument_group("machines")
    machines.add_argument("--machines", type=positive_int, default=1, metavar="N", help="(default 1)")
    machines.add_argument(
        "--routing",
        choices=("least-work", "round-robin"),
        default="least-work",
        help="who of them gets a request (default least-work, as estimated without its output length)",
    )
    machines.add_argument("--batch", type=positive_int, metavar="N", help="max_num_seqs, not the file's")
    knobs = parser.add_argument_group("knobs, as in the configuration")
    knobs.add_argument("--head-start-gamma", type=positive_float, default=0.0, metavar="X")
    knobs.add_argument("--max-pause-s", type=positive_float, metavar="SECONDS")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a picture there (needs the extra `bench`)"
    )


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in POLICIES:
            raise ArgumentTypeError(f"{name!r} is no policy; there are {', '.join(POLICIES)}")
    return names


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from scheduler.config import SchedulerConfig
    from scheduler.machine import MachineError, load_machine
    from scheduler.replay.load import LoadError
    from scheduler.replay.run import Shaping
    from scheduler.replay.trace import TraceError, read_trace
    from server.bench.plots import PlotError
    from server.bench.simulation import SimulationError, SimulationOptions, run_simulation

    config = SchedulerConfig(head_start_gamma=args.head_start_gamma)
    if args.max_pause_s is not None:
        config = replace(config, max_pause_s=args.max_pause_s)
    try:
        machine = load_machine(args.machine)
        options = SimulationOptions(
            machine=replace(machine, max_num_seqs=args.batch or machine.max_num_seqs),
            config=config,
            policies=args.policy,
            shaping=Shaping(
                divide_lengths=args.divide_lengths,
                clip_output=args.clip_output,
                load=args.load,
                burst=args.burst,
            ),
            machines=args.machines,
            routing=args.routing,
            json_path=args.json,
            plot_path=args.plot,
        )
        run_simulation(read_trace(args.trace, args.limit), options)
    except (MachineError, TraceError, LoadError, PlotError, SimulationError) as error:
        raise CommandError(str(error)) from None
    return 0
