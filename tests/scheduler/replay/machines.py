"""Machines and policies for tests of the replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from scheduler.clock import Clock
from scheduler.config import SchedulerConfig
from scheduler.costs import CostModel
from scheduler.lengths import Lengths
from scheduler.machine import Machine
from scheduler.policies import Policy, make_policy
from scheduler.replay.replica import Replica
from scheduler.replay.trace import TraceRequest

# A step of 1 s and nothing else, so that times can be worked out by hand.
ONE_SECOND = CostModel(step_s=1.0, slice_s=0.0, token_s=0.0, pair_s=0.0, host_page_s=0.5, disk_page_s=2.0)
BASE = Machine(
    name="tiny",
    costs=ONE_SECOND,
    max_num_seqs=1,
    max_num_batched_tokens=8,
    page_size=4,
    num_pages=1000,
    host_pages=0,
    disk_pages=0,
    max_model_len=1000,
)


def machine(**changes: Any) -> Machine:
    return replace(BASE, **changes)


def maker(name: str, on: Machine, **settings: Any) -> Callable[[Clock], Policy]:
    config = SchedulerConfig(
        policy=name,
        max_num_seqs=on.max_num_seqs,
        max_num_batched_tokens=on.max_num_batched_tokens,
        **settings,
    )
    return lambda clock: make_policy(config, on.costs, clock, Lengths())


def run(
    name: str,
    on: Machine,
    requests: Sequence[TraceRequest],
    max_pause_s: float = 1e6,
    on_finish: Callable[[], None] = lambda: None,
    growth_share: float = 0.0,
    **settings: Any,
) -> Replica:
    return Replica(
        on,
        maker(name, on, **settings),
        requests,
        max_pause_s=max_pause_s,
        growth_share=growth_share,
        known_lengths=name == "srpt",
        on_finish=on_finish,
    ).run()


def request(arrival_s: float, prompt_len: int, output_len: int, priority: int = 0) -> TraceRequest:
    return TraceRequest(arrival_s, prompt_len, output_len, "", priority)
