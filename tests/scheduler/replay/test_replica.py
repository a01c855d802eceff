"""Each rule of the replay on cases small enough to be worked out by hand.

A step lasts 1 s whatever is in it, a page of 4 tokens comes back from the host in 0.5 s; there are one place
and 8 tokens a step unless said otherwise.
"""

from __future__ import annotations

import pytest

from scheduler.costs import CostModel
from scheduler.replay.replica import Replica
from scheduler.replay.ticks import TickCosts, seconds, ticks
from tests.scheduler.replay.machines import machine, request, run


def finished_s(replica: Replica) -> list[float]:
    return [seconds(job.finished) for job in replica.jobs]


def first_tokens_s(replica: Replica) -> list[float]:
    return [seconds(job.first_token) for job in replica.jobs]


def test_two_requests_and_one_place() -> None:
    replica = run("fcfs", machine(), [request(0, 4, 3), request(0.5, 4, 2)])
    assert first_tokens_s(replica) == [1, 4]
    assert finished_s(replica) == [3, 5]
    assert replica.counts.num_steps == 5
    assert replica.counts.computed_tokens == 4 + 2 + 4 + 1


def test_two_requests_and_two_places_share_every_step() -> None:
    replica = run("fcfs", machine(max_num_seqs=2), [request(0, 4, 3), request(0, 4, 2)])
    assert first_tokens_s(replica) == [1, 1]
    assert finished_s(replica) == [3, 2]


@pytest.mark.parametrize("sizes", [(13, 1), (4, 10)])
def test_a_request_that_fits_nowhere_is_an_error_and_no_endless_wait(sizes: tuple[int, int]) -> None:
    with pytest.raises(AssertionError, match="fits into no empty machine"):
        run("fcfs", machine(num_pages=3), [request(0, *sizes)])


def test_a_long_prompt_is_computed_in_chunks_beside_a_decode() -> None:
    on = machine(max_num_seqs=2)
    replica = run("fcfs", on, [request(0, 4, 5), request(0.5, 20, 2)])
    # Of 8 tokens a step the decode takes one: 7 + 7 + 6 tokens of the prompt.
    assert first_tokens_s(replica) == [1, 4]
    assert finished_s(replica) == [5, 5]


def test_a_step_costs_what_its_slices_cost() -> None:
    costs = CostModel(step_s=1.0, slice_s=0.1, token_s=0.01, context_s=0.001, pair_s=0.0001)
    replica = run("fcfs", machine(costs=costs), [request(0, 3, 3)])
    prompt_s = 1.0 + 0.1 + 3 * 0.01 + 3 * 0.001 + (1 + 2 + 3) * 0.0001
    tokens_s = 2 * (1.0 + 0.1 + 0.01) + (4 + 5) * (0.001 + 0.0001)
    assert first_tokens_s(replica) == pytest.approx([prompt_s])
    assert finished_s(replica) == pytest.approx([prompt_s + tokens_s])
    assert replica.jobs[0].attained_s == pytest.approx(prompt_s + tokens_s)  # its share of the step is 1


def test_service_is_attributed_not_the_time_of_the_batch() -> None:
    replica = run("fcfs", machine(max_num_seqs=2), [request(0, 4, 3), request(0, 4, 2)])
    assert [job.attained_s for job in replica.jobs] == [1.5, 1.0]  # half a step each time


def test_who_precedes_takes_the_place_and_the_victim_goes_on_where_it_was() -> None:
    replica = run("priority", machine(), [request(0, 4, 6, 1), request(1.5, 4, 2, 0)])
    # The first has 2 tokens at 2 s, is put aside with 5 tokens computed, and finds a page of 4 again at 4 s;
    # two tokens go in one step, which is its third output.
    assert finished_s(replica) == [8, 4]
    assert replica.counts.preempted_for_place == 1
    assert replica.counts.recomputed_tokens == 1
    assert seconds(replica.counts.longest_stream_pause) == 2


def test_nobody_is_displaced_under_a_policy_that_does_not_preempt() -> None:
    replica = run("fcfs", machine(), [request(0, 4, 6, 1), request(1.5, 4, 2, 0)])
    assert finished_s(replica) == [6, 8]
    assert replica.counts.preempted_for_place == 0


def test_a_preemption_must_be_worth_the_restoring() -> None:
    # A page of tokens again costs a step of 1 s, so a head start of less displaces nobody.
    settings = {"static_levels": 2, "static_quantum_s": 1.5}
    requests = [request(0, 4, 9), request(0.5, 4, 1)]
    kept = run("mlfq-static", machine(), requests, static_max_head_start_s=1.2, **settings)
    displaced = run("mlfq-static", machine(), requests, static_max_head_start_s=1.8, **settings)
    assert kept.counts.preempted_for_place == 0
    assert finished_s(kept) == [9, 10]
    assert displaced.counts.preempted_for_place == 1
    assert finished_s(displaced) == [10, 3]


def test_a_started_stream_pauses_no_longer_than_the_bound() -> None:
    low, high = request(0, 4, 6, 1), [request(1.5 + k, 4, 2, 0) for k in range(50)]
    unbounded = run("priority", machine(), [low, *high])
    bounded = run("priority", machine(), [low, *high], max_pause_s=61.0)
    assert finished_s(unbounded)[0] == 2 + 2 * 50 + 4
    # Put aside at 2 s, overdue at 63 s; the next place is free at 64 s, but it takes that of one who costs
    # 1 s to restore: less than a fiftieth of the bound.
    assert seconds(bounded.counts.longest_stream_pause) == 61
    assert finished_s(bounded)[0] == 63 + 4
    assert bounded.counts.preempted_for_place == 2  # it, and who had its place


def test_who_is_overdue_waits_for_a_place_where_restoring_costs_much() -> None:
    low, high = request(0, 4, 6, 1), [request(1.5 + k, 4, 2, 0) for k in range(20)]
    replica = run("priority", machine(), [low, *high], max_pause_s=5.0)
    # Put aside at 2 s, overdue at 7 s; the next place is free at 8 s.
    assert finished_s(replica)[0] == 8 + 4
    assert replica.counts.preempted_for_place == 1


def test_short_pages_put_the_last_aside_and_its_own_are_found_again() -> None:
    on = machine(max_num_seqs=2, num_pages=5)
    replica = run("fcfs", on, [request(0, 4, 9), request(0, 4, 9)])
    # Two pages each at first; both need a third for their sixth output, at 5 s. The second leaves two full
    # pages beside the three of the first, and with them needs one step for its sixth output, at 9 s.
    assert replica.counts.preempted_for_pages == 1
    assert finished_s(replica) == [9, 9 + 4]
    assert replica.counts.recomputed_tokens == 0


def test_pages_wait_on_the_host_when_others_need_theirs() -> None:
    on = machine(num_pages=5)
    requests = [request(0, 8, 6, 1), request(1.5, 8, 4, 0)]
    lost = run("priority", on, requests)
    assert (lost.memory.pages_out, lost.memory.pages_in, lost.memory.pages_lost) == (0, 0, 0)
    on = machine(num_pages=4)
    lost = run("priority", on, requests)
    assert (lost.memory.pages_out, lost.memory.pages_in, lost.memory.pages_lost) == (0, 0, 1)
    assert lost.counts.recomputed_tokens == 5  # of 9 tokens a page is found
    kept = run("priority", machine(num_pages=4, host_pages=8), requests)
    assert (kept.memory.pages_out, kept.memory.pages_in, kept.memory.pages_lost) == (1, 1, 0)
    assert kept.counts.recomputed_tokens == 1
    # At 6 s the first gets its place back, at 6.5 s its page is there: four more tokens.
    assert finished_s(kept) == [10.5, 6]


def test_everything_finishes_once_with_its_tokens() -> None:
    on = machine(max_num_seqs=3, num_pages=12, host_pages=3)
    requests = [request(k // 3, 1 + 7 * k % 19, 1 + 5 * k % 23, k % 3) for k in range(60)]
    for policy in ("fcfs", "priority", "hrrn", "srpt", "mlfq-static", "mlfq"):
        done: list[int] = []
        replica = run(policy, on, requests, max_pause_s=10.0, on_finish=lambda done=done: done.append(1))
        assert len(done) == 60
        for job, one in zip(replica.jobs, requests, strict=True):
            assert job.num_output == one.output_len
            assert job.arrival < job.first_token <= job.finished
            assert job.reached == one.prompt_len + one.output_len - 1
        fresh = sum(one.prompt_len + one.output_len - 1 for one in requests)
        assert replica.counts.computed_tokens - replica.counts.recomputed_tokens == fresh
        assert replica.memory.held == replica.memory.cached == 0
        assert replica.memory.host_free == 3
        assert replica.counts.busy <= replica.counts.end


def test_the_same_trace_is_replayed_the_same_way() -> None:
    requests = [request(k // 2, 1 + 7 * k % 19, 1 + 5 * k % 23) for k in range(50)]
    on = machine(max_num_seqs=3, num_pages=12)
    runs = [run("mlfq", on, requests) for _ in range(2)]
    assert finished_s(runs[0]) == finished_s(runs[1])
    assert runs[0].counts == runs[1].counts


def test_the_steps_until_a_time_are_the_least_that_reach_it() -> None:
    for pair_s in (0.0, 1e-6, 0.1):
        costs = TickCosts.of(CostModel(step_s=0.01, slice_s=1e-3, token_s=0.0, pair_s=pair_s), 4)
        for duration_s in (0.0, 0.01, 0.0141, 3.3, 500.0):
            count = costs.steps_until(ticks(duration_s), 3, 100)
            assert costs.steps(count, 3, 100) >= ticks(duration_s)
            assert count == 1 or costs.steps(count - 1, 3, 100) < ticks(duration_s)
