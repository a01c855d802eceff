"""Changes to a trace before it is replayed: lengths that fit, times that make the wanted load, machines.

The work of a request is the service attributed to it: its prefill in chunks of the step budget, and one
output token at a time. A slice is charged its own cost and a share of the step's fixed cost, 1 / places; so a
step with every place taken lasts exactly as long as the work in it. `offered_load` compares that with time.
Places that stay empty while prompts are computed make the attainable rate lower than one second of work per
second: by under 1 % where outputs are long, by some 7 % for prompts of 2,048 tokens, 28 out and 64 places.
So the load that is asked for is measured (run.py): at 1, requests arrive for as long as the machines need to
serve all of them in the order of arrival when none has to be waited for.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.machine import Machine
    from scheduler.replay.trace import Trace, TraceRequest

BURST_S = 60.0
BURST_LOAD = 2.0


class LoadError(Exception):
    """The trace cannot be shaped like that. The text is one line."""


def work_s(request: TraceRequest, machine: Machine, output_len: int | None = None) -> float:
    """Seconds of service attributed to a request, without preemptions."""
    costs, places = machine.costs, machine.max_num_seqs
    num_output = request.output_len if output_len is None else output_len
    prefill_s = costs.prefill(0, request.prompt_len, machine.max_num_batched_tokens, places)
    # The first output token comes with the prefill; the cost of the others grows evenly.
    decode_s = (
        costs.decode(request.prompt_len, places) + (costs.context_s + costs.pair_s) * (num_output - 2) / 2
    )
    return prefill_s + max(0, num_output - 1) * decode_s


def offered_load(trace: Trace, machine: Machine, machines: int = 1) -> float:
    """Work per second of the trace over what the machines do per second; infinity if all arrive at once."""
    duration_s = trace.requests[-1].arrival_s
    total_s = sum(work_s(request, machine) for request in trace.requests)
    return total_s / duration_s / machines if duration_s else float("inf")


def divided(trace: Trace, divisor: float) -> Trace:
    """Prompts and outputs are shorter by a factor, but at least one token."""
    shorter = (
        replace(
            request,
            prompt_len=max(1, round(request.prompt_len / divisor)),
            output_len=max(1, round(request.output_len / divisor)),
        )
        for request in trace.requests
    )
    return trace.changed(shorter, f"lengths divided by {divisor:g}")


def clipped(trace: Trace, max_output: int) -> Trace:
    count = sum(request.output_len > max_output for request in trace.requests)
    shorter = (replace(request, output_len=min(request.output_len, max_output)) for request in trace.requests)
    return trace.changed(shorter, f"outputs clipped to {max_output} tokens ({count:,} of them)")


def fitted(trace: Trace, machine: Machine) -> Trace:
    """Requests that exceed the context length or all pages of the device are cut: the prompt to leave room
    for a token, then the output."""
    most = min(machine.max_model_len, machine.num_pages * machine.page_size)
    if most < 2:
        raise LoadError(f"{machine.name} has no room for a prompt and a token")
    requests = []
    for request in trace.requests:
        prompt_len = min(request.prompt_len, most - 1)
        output_len = min(request.output_len, most - prompt_len)
        requests.append(replace(request, prompt_len=prompt_len, output_len=output_len))
    count = sum(new != old for new, old in zip(requests, trace.requests, strict=True))
    return trace.changed(requests, f"{count:,} requests cut to {most:,} tokens") if count else trace


def stretched(trace: Trace, duration_s: float, why: str) -> Trace:
    """Arrival times, multiplied so that the last is at `duration_s`."""
    now_s = trace.requests[-1].arrival_s
    if not now_s:
        raise LoadError(f"{trace.name}: all requests arrive at once, no load can be set")
    factor = duration_s / now_s
    spread = (replace(request, arrival_s=request.arrival_s * factor) for request in trace.requests)
    return trace.changed(spread, f"arrival times x {factor:.4g} {why}")


def at_once(trace: Trace) -> Trace:
    return trace.changed((replace(request, arrival_s=0.0) for request in trace.requests), "all at once")


def with_burst(trace: Trace, machine: Machine, machines: int = 1) -> Trace:
    """From the middle of the requests on, as many as make twice the capacity for a minute come within that
    minute; the later ones follow that much sooner."""
    requests = trace.requests
    begin = end = len(requests) // 2
    left_s = BURST_LOAD * BURST_S * machines
    while left_s > 0:
        if end >= len(requests):
            raise LoadError(f"{trace.name}: too few requests for a burst of {BURST_S:g} s")
        left_s -= work_s(requests[end], machine)
        end += 1
    base_s = requests[begin].arrival_s
    stop_s = requests[end].arrival_s if end < len(requests) else requests[-1].arrival_s
    if stop_s - base_s <= BURST_S:
        return trace.changed(requests, "no burst added: the middle of it is one")
    pace = BURST_S / (stop_s - base_s)
    moved = [
        *requests[:begin],
        *(replace(one, arrival_s=base_s + (one.arrival_s - base_s) * pace) for one in requests[begin:end]),
        *(replace(one, arrival_s=one.arrival_s - (stop_s - base_s) + BURST_S) for one in requests[end:]),
    ]
    assert all(before.arrival_s <= after.arrival_s for before, after in pairwise(moved))
    return trace.changed(moved, f"{BURST_LOAD:g} times the capacity for {BURST_S:g} s in the middle")


def routed(trace: Trace, machine: Machine, machines: int, routing: str) -> list[list[TraceRequest]]:
    """The requests of each machine. `round-robin`, or `least-work`: to the machine with the least
    outstanding work, which a router estimates as what it sent there, at the mean output length, less a second
    per second."""
    parts: list[list[TraceRequest]] = [[] for _ in range(machines)]
    if routing == "round-robin":
        for k, request in enumerate(trace.requests):
            parts[k % machines].append(request)
        return parts
    mean_output = round(sum(request.output_len for request in trace.requests) / len(trace.requests))
    drained = [(0.0, k) for k in range(machines)]  # when each will have done what it was sent
    heapify(drained)
    for request in trace.requests:
        until_s, k = drained[0]
        parts[k].append(request)
        heapreplace(drained, (max(until_s, request.arrival_s) + work_s(request, machine, mean_output), k))
    return parts
