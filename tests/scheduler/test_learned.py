from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.costs import CostModel
from scheduler.length_histogram import EDGES
from scheduler.lengths import Lengths
from scheduler.policies.base import Policy
from scheduler.policies.learned import NUM_LEVELS, LearnedFeedbackQueue
from scheduler.policies.tail import MAX_STRENGTH, TAU, UPDATE_EVERY, TailRate

COSTS = CostModel(step_s=0.006, slice_s=3e-5, token_s=2.5e-5, pair_s=0.0)
MAX_HEAD_START_S = 600.0


@dataclass(slots=True, kw_only=True)
class OneWork:
    tenant: str = ""
    priority: int = 0
    arrival_s: float = 0.0
    prompt_len: int = 1000
    num_output: int = 0
    max_output: int = 4096
    num_left: int = 0
    attained_s: float = 0.0
    level: int = 0
    expected_s: float = 0.0
    fcfs_s: float = 0.0


def queue(
    *,
    costs: CostModel = COSTS,
    gamma: float = 0.1,
    lengths: Lengths | None = None,
    max_head_start_s: float = MAX_HEAD_START_S,
) -> LearnedFeedbackQueue:
    return LearnedFeedbackQueue(costs, 2048, 64, gamma, max_head_start_s, lengths or Lengths())


def slower(factor: float) -> CostModel:
    return CostModel(
        step_s=COSTS.step_s * factor,
        slice_s=COSTS.slice_s * factor,
        token_s=COSTS.token_s * factor,
        pair_s=0.0,
    )


def taught(lengths: dict[int, int], prompt: int = 1000) -> Lengths:
    """Each length as often as told."""
    learned = Lengths()
    for length, count in lengths.items():
        for _ in range(count):
            learned.observe("", prompt, length, natural=True)
    return learned


def test_it_is_a_policy() -> None:
    policy: Policy = queue()
    assert policy.preemptive


def test_it_joins_where_its_prefill_puts_it() -> None:
    policy = queue(lengths=taught({10: 1000}))
    levels = [policy.level(OneWork(prompt_len=n, num_left=n)) for n in (16, 1000, 8000, 64000)]
    assert levels == sorted(set(levels))


def test_what_is_in_the_cache_shortens_the_prediction() -> None:
    policy = queue(lengths=taught({10: 1000}))
    assert policy.level(OneWork(prompt_len=8000, num_left=100)) < policy.level(
        OneWork(prompt_len=8000, num_left=8000)
    )


def test_it_rises_when_its_prefill_is_done() -> None:
    policy = queue(lengths=taught({10: 1000}))
    levels = [policy.level(OneWork(prompt_len=8000, num_left=left)) for left in (8000, 4000, 0)]
    assert levels == sorted(set(levels), reverse=True)


def test_it_sinks_while_a_heavy_tail_shows() -> None:
    pareto = {n: round(1e5 * (n**-1.2 - (n + 1) ** -1.2)) for n in range(1, 2000)}
    policy = queue(lengths=taught({n: count // 20 for n, count in pareto.items()}))
    levels = [policy.level(OneWork(num_output=n)) for n in (0, 10, 100, 1000)]
    assert levels == sorted(set(levels))


def test_it_rises_towards_an_end_that_is_known() -> None:
    policy = queue(lengths=taught({500: 3000}))
    levels = [policy.level(OneWork(num_output=n)) for n in (0, 300, 420)]
    assert levels == sorted(set(levels), reverse=True)
    assert policy.level(OneWork(max_output=5)) < levels[-1]


def test_recomputed_output_counts_as_prefill() -> None:
    """After a restart the output of before is computed again with the prompt."""
    policy = queue()
    one = OneWork(prompt_len=100, num_output=900, num_left=1000)
    expected = COSTS.prefill(0, 1000, 2048, 64) + COSTS.decode(1000, 64)
    assert policy.w(one) > expected


@given(st.integers(0, 3000), st.integers(1, 4096), st.integers(1, 200_000))
def test_every_work_has_a_level_and_a_next_change(num_output: int, more: int, prompt_len: int) -> None:
    policy = queue()
    one = OneWork(num_output=num_output, max_output=num_output + more, prompt_len=prompt_len)
    assert 0 <= policy.level(one) < NUM_LEVELS
    assert num_output < policy.next_change(one)
    assert policy.next_change(one) == math.inf or policy.next_change(one) < one.max_output


def test_the_level_is_the_same_until_the_next_change() -> None:
    policy = queue(costs=replace(COSTS, pair_s=0.0))
    one = OneWork(num_output=300)
    change = policy.next_change(one)
    assert change == min(edge for edge in EDGES if edge > 300)
    assert policy.level(replace(one, num_output=int(change) - 1)) == policy.level(one)


def head_starts(policy: LearnedFeedbackQueue) -> list[float]:
    return [-policy.key(level, 0.0) for level in range(NUM_LEVELS)]


@pytest.mark.parametrize("gamma", [1e-6, 0.001, 0.1, 10.0, 1e4])
def test_head_starts_fall_and_are_bounded(gamma: float) -> None:
    starts = head_starts(queue(gamma=gamma))
    assert starts == sorted(starts, reverse=True)
    assert all(0.0 <= start <= MAX_HEAD_START_S for start in starts)


def test_head_starts_are_those_of_the_boost_policy() -> None:
    policy = queue(gamma=0.1)
    one = OneWork(prompt_len=4000, num_left=4000)
    w = policy.w(one)
    expected = 10.0 * math.log(1.0 / (1.0 - math.exp(-0.1 * w)))
    step = 10.0 * math.log(2.0) / 2.0  # between neighbouring levels of small w
    assert -policy.key(policy.level(one), 0.0) == pytest.approx(expected, abs=step)


def test_a_small_one_overtakes_only_those_who_came_shortly_before() -> None:
    policy = queue()
    small, large = (policy.level(OneWork(prompt_len=n, num_left=n)) for n in (16, 60000))
    assert policy.key(small, 20.0) < policy.key(large, 0.0)
    assert policy.key(small, MAX_HEAD_START_S + 1.0) > policy.key(large, 0.0)


def test_a_short_bound_is_spent_around_the_typical_work() -> None:
    """On a slow machine all of 600 s would go to works so small that there are none."""
    policy = queue(costs=slower(20.0), gamma=0.1 / 20, lengths=taught({10: 1000, 500: 1000}))
    short, typical, long = (policy.level(OneWork(prompt_len=n, num_left=n)) for n in (300, 1000, 4000))
    starts = head_starts(policy)
    assert MAX_HEAD_START_S > starts[short] > starts[typical] > starts[long] > 0.0
    assert (starts[0], starts[-1]) == (MAX_HEAD_START_S, 0.0)


def test_a_cost_model_of_nothing_breaks_nothing() -> None:
    policy = queue(costs=CostModel(step_s=0.0, slice_s=0.0, token_s=0.0, pair_s=0.0), gamma=0.0)
    assert policy.level(OneWork(num_left=1000)) < NUM_LEVELS
    policy.learn(OneWork(num_output=9), natural=True)
    assert all(math.isfinite(start) for start in head_starts(policy))


def test_no_head_starts_is_first_come_first_served() -> None:
    assert set(head_starts(queue(max_head_start_s=0.0))) == {0.0}


def test_what_ends_is_learned_under_its_tenant_and_class() -> None:
    policy = queue()
    before = policy.w(OneWork(tenant="a"))
    for _ in range(500):
        policy.learn(OneWork(tenant="a", num_output=5), natural=True)
    assert policy.w(OneWork(tenant="a")) < before / 5
    policy.learn(OneWork(num_output=0), natural=False)  # aborted before its first token


def after(factor: float, seconds: float, count: int = 3000) -> LearnedFeedbackQueue:
    """A queue that saw `count` sequences end which first come first served keeps for about so long."""
    policy = queue(costs=slower(factor), gamma=0.0)
    for _ in range(count):
        policy.learn(OneWork(num_output=50, fcfs_s=seconds), natural=True)
    return policy


def test_what_those_present_need_is_what_a_newcomer_would_wait_for() -> None:
    policy = queue(gamma=0.0)
    works = [OneWork(num_left=1000) for _ in range(100)]
    for work in works:
        policy.enter(work)
    waits = [work.fcfs_s for work in works]
    assert waits == sorted(waits)
    assert waits[-1] > 90 * works[0].expected_s > 0.0
    for work in works:
        policy.leave(work)
        policy.leave(work)  # again: ignored
    first = OneWork(num_left=1000)
    policy.enter(first)
    assert first.fcfs_s == pytest.approx(waits[0])


def test_gamma_is_free_of_scale() -> None:
    assert after(1.0, 8.0, 0).gamma == pytest.approx(20 * after(20.0, 160.0, 0).gamma, rel=0.15)
    assert after(1.0, 8.0).gamma == pytest.approx(20 * after(20.0, 160.0).gamma, rel=0.15)


def test_gamma_begins_where_a_busy_machine_of_this_speed_is() -> None:
    assert 1.0 < 1.0 / after(1.0, 8.0, 0).gamma < 20.0


def test_gamma_follows_the_observed_times_and_moves_the_head_starts() -> None:
    fast, slow = after(1.0, 3.0), after(1.0, 60.0)
    assert fast.gamma == pytest.approx(20 * slow.gamma, rel=0.25)
    small, large = (fast.level(OneWork(prompt_len=n, num_left=n)) for n in (100, 4000))
    fast_s, slow_s = (starts[small] - starts[large] for starts in map(head_starts, (fast, slow)))
    assert slow_s > 10 * fast_s > 0.0


def test_a_given_gamma_stays() -> None:
    policy = queue(gamma=0.25)
    for _ in range(1000):
        policy.learn(OneWork(num_output=50), natural=True)
    assert policy.gamma == 0.25


def test_aborted_ones_do_not_count_as_fast() -> None:
    policy = queue(gamma=0.0)
    before = policy.gamma
    for _ in range(1000):
        policy.learn(OneWork(num_output=3, fcfs_s=0.01), natural=False)
    assert policy.gamma == before


def _sizes(rate: TailRate, count: int, time_s: float, spread: float) -> random.Random:
    draw = random.Random(1)
    for _ in range(count):
        w = draw.lognormvariate(-3.0, spread)
        rate.add(time_s, w, w)
    return draw


def test_one_outlier_moves_gamma_little() -> None:
    rate = TailRate(10.0)
    _sizes(rate, 5000, 10.0, 0.5)
    before = rate.gamma
    for _ in range(UPDATE_EVERY):
        rate.add(10.0, 0.05, 0.05)
    rate.add(1e9, 0.05, 0.05)
    assert rate.gamma == pytest.approx(before, rel=0.2)


def test_gamma_changes_rarely_and_slowly() -> None:
    rate = TailRate(10.0)
    draw = _sizes(rate, 5000, 10.0, 0.5)
    before = rate.gamma
    sizes = [draw.lognormvariate(-3.0, 0.5) for _ in range(5000)]
    assert sum(rate.add(20.0, w, w) for w in sizes) < 15
    assert before / 4.5 < rate.gamma < before  # the percentile twice, of nearly the same mean


def test_the_far_tail_is_left_where_it_is() -> None:
    """For a lognormal w with service w, z is normal of mean -s^2 and variance s^2, and u = 2."""
    rate = TailRate(1.0)
    _sizes(rate, 20_000, 10.0, 0.5)
    assert 1.0 / rate.gamma == pytest.approx(2.0 * TAU * 10.0, rel=0.2)


def test_equal_sequences_get_no_huge_head_starts() -> None:
    rate = TailRate(10.0)
    for _ in range(20_000):
        rate.add(10.0, 0.05, 0.05)
    assert 1.0 / rate.gamma <= 1.1 * MAX_STRENGTH * TAU * 10.0


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_gamma_has_no_scale(factor: float) -> None:
    rate, scaled = TailRate(10.0), TailRate(10.0 * factor)
    draw = random.Random(3)
    for _ in range(3000):
        w, time_s = draw.lognormvariate(-3.0, 0.7), draw.expovariate(0.1)
        rate.add(time_s, w, w)
        scaled.add(time_s * factor, w * factor, w * factor)
    assert scaled.gamma * factor == pytest.approx(rate.gamma, rel=0.3)


@pytest.mark.parametrize("time_s", [0.0, 1e12])
def test_extreme_times_give_a_gamma(time_s: float) -> None:
    rate = TailRate(10.0)
    for _ in range(10_000):
        rate.add(time_s, 0.05, 0.05)
    assert 0.0 < rate.gamma < float("inf")
