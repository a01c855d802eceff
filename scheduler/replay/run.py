"""Replays a whole trace: one policy, one or many machines."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from scheduler.config import SchedulerConfig
from scheduler.lengths import Lengths
from scheduler.policies import make_policy
from scheduler.replay.load import at_once, clipped, divided, fitted, routed, stretched, with_burst
from scheduler.replay.replica import Replica
from scheduler.replay.report import report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.clock import Clock
    from scheduler.machine import Machine
    from scheduler.policies import Policy
    from scheduler.replay.report import Report
    from scheduler.replay.trace import Trace, TraceRequest

ROUTINGS = ("least-work", "round-robin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """What to change about a trace, in this order. None, 1.0 or False: nothing."""

    divide_lengths: float = 1.0
    clip_output: int | None = None
    load: float | None = None
    burst: bool = False

    def apply(self, trace: Trace, machine: Machine, machines: int) -> Trace:
        """Raises LoadError."""
        if self.divide_lengths != 1.0:
            trace = divided(trace, self.divide_lengths)
        if self.clip_output:
            trace = clipped(trace, self.clip_output)
        trace = fitted(trace, machine)
        if self.load:
            busy_s = saturated_s(trace, machine, machines)
            trace = stretched(trace, busy_s / self.load, f"for a load of {self.load:g}")
        if self.burst:
            trace = with_burst(trace, machine, machines)
        return trace


def saturated_s(trace: Trace, machine: Machine, machines: int) -> float:
    """How long the machines take to serve the trace in the order of arrival when all of it waits at once."""
    return replay(
        at_once(trace), machine, SchedulerConfig(policy="fcfs"), machines=machines
    ).report.duration_s


@dataclass(frozen=True, slots=True)
class Replayed:
    """Of every request, for plots: tokens in and out, and seconds longer than on an empty machine."""

    report: Report
    sizes: tuple[int, ...]
    waits_s: tuple[float, ...]


def replay(
    trace: Trace,
    machine: Machine,
    config: SchedulerConfig,
    *,
    machines: int = 1,
    routing: str = "least-work",
    on_finish: Callable[[], None] = lambda: None,
) -> Replayed:
    """The trace is replayed as it is (see `Shaping`). Of `config` the policy and its knobs count; places,
    tokens and pages are the machine's. Every machine learns for itself."""
    begun_s = time.perf_counter()
    parts = routed(trace, machine, machines, routing) if machines > 1 else [trace.requests]
    replicas = [_replica(part, machine, config, on_finish) for part in parts if part]
    for replica in replicas:
        replica.run()
    jobs = [job for replica in replicas for job in replica.jobs]
    return Replayed(
        report=report(config.policy, replicas, time.perf_counter() - begun_s),
        sizes=tuple(job.prompt_len + job.output_len for job in jobs),
        waits_s=tuple(replica.wait_s(job) for replica in replicas for job in replica.jobs),
    )


def _replica(
    requests: Sequence[TraceRequest], machine: Machine, config: SchedulerConfig, on_finish: Callable[[], None]
) -> Replica:
    def make(clock: Clock) -> Policy:
        return make_policy(settings, machine.costs, clock, Lengths())

    settings = replace(
        config, max_num_seqs=machine.max_num_seqs, max_num_batched_tokens=machine.max_num_batched_tokens
    )
    return Replica(
        machine,
        make,
        requests,
        max_pause_s=config.max_pause_s,
        growth_share=config.growth_share,
        known_lengths=config.policy == "srpt",
        on_finish=on_finish,
    )
