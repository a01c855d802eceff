"""Steps taken many at once end exactly where the same steps taken one by one end."""

from __future__ import annotations

import random

import pytest

from scheduler.costs import CostModel
from scheduler.machine import Machine
from scheduler.replay.replica import Replica
from scheduler.replay.trace import TraceRequest
from tests.scheduler.replay.machines import machine, maker, run
from tests.scheduler.replay.naive import Naive

SEEDS = range(50)
POLICIES = ("fcfs", "priority", "mlfq-static", "mlfq", "srpt")


def random_case(seed: int) -> tuple[Machine, list[TraceRequest], float, float]:
    rng = random.Random(seed)
    costs = CostModel(
        step_s=rng.choice((1e-3, 6e-3)),
        slice_s=rng.choice((0.0, 1e-4)),
        token_s=rng.choice((0.0, 1e-4)),
        context_s=rng.choice((0.0, 1e-6)),
        pair_s=rng.choice((0.0, 1e-6, 1e-5)),
        host_page_s=rng.choice((1e-5, 1e-2)),
        disk_page_s=1e-2,
    )
    longest = rng.choice((20, 100))
    page_size = rng.choice((1, 4, 16))
    most = -(-2 * longest // page_size)  # pages of the largest request
    on = machine(
        costs=costs,
        max_num_seqs=rng.choice((1, 2, 5, 12)),
        max_num_batched_tokens=rng.choice((12, 40)),
        page_size=page_size,
        num_pages=rng.choice((most, 2 * most, 5 * most, 1000 * most)),
        host_pages=rng.choice((0, most, 10 * most)),
        disk_pages=rng.choice((0, most)),
    )
    pace_s = rng.choice((1e-3, 0.02, 0.2))
    now_s = 0.0
    requests = []
    for _ in range(rng.choice((3, 30))):
        now_s += rng.choice((0.0, rng.expovariate(1 / pace_s)))
        requests.append(
            TraceRequest(
                now_s, rng.randint(1, longest), rng.randint(1, longest), rng.choice("ab"), rng.randint(0, 3)
            )
        )
    return on, requests, rng.choice((0.01, 0.3, 30.0)), rng.choice((0.0, 0.1, 1.0))


@pytest.mark.parametrize("policy", POLICIES)
def test_many_steps_at_once_equal_one_at_a_time(policy: str) -> None:
    jumped = 0
    for seed in SEEDS:
        on, requests, max_pause_s, growth_share = random_case(seed)
        settings = {"static_quantum_s": 0.01, "static_max_head_start_s": 0.5, "head_start_gamma": 1.0}
        fast = run(policy, on, requests, max_pause_s, growth_share=growth_share, **settings)
        make, known_lengths = maker(policy, on, **settings), policy == "srpt"
        slow = Naive(on, make, requests, max_pause_s, growth_share, known_lengths).run()
        assert outcome(fast) == outcome_of_naive(slow), f"{policy}, seed {seed}"
        jumped += fast.counts.num_steps - fast.counts.num_events
    assert jumped > 0


def test_the_response_ratio_with_enough_pages() -> None:
    for seed in SEEDS:
        on, requests, max_pause_s, growth_share = random_case(seed)
        on = machine(costs=on.costs, max_num_seqs=on.max_num_seqs, max_num_batched_tokens=40)
        fast = run("hrrn", on, requests, max_pause_s, growth_share=growth_share)
        slow = Naive(on, maker("hrrn", on), requests, max_pause_s, growth_share, False).run()
        assert outcome(fast) == outcome_of_naive(slow), f"seed {seed}"


def outcome(replica: Replica) -> dict[str, object]:
    counts, memory = replica.counts, replica.memory
    return {
        "jobs": [(job.first_token, job.finished, job.attained, job.level) for job in replica.jobs],
        "preempted": (counts.preempted_for_place, counts.preempted_for_pages),
        "pages": (memory.pages_out, memory.pages_in, memory.pages_lost),
        "tokens": (counts.computed_tokens, counts.recomputed_tokens),
        "steps": counts.num_steps,
        "pause": max(counts.longest_stream_pause, counts.longest_prefill_pause),
    }


def outcome_of_naive(naive: Naive) -> dict[str, object]:
    return {
        "jobs": [(item.first_token, item.finished, item.attained, item.level) for item in naive.items],
        "preempted": (naive.preempted_for_place, naive.preempted_for_pages),
        "pages": (naive.pages_out, naive.pages_in, naive.pages_lost),
        "tokens": (naive.computed_tokens, naive.recomputed_tokens),
        "steps": naive.num_steps,
        "pause": naive.longest_pause,
    }
