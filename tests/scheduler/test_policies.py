"""The orders without learning: what each prefers, and how far it lets anyone overtake."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.clock import ManualClock
from scheduler.config import POLICIES, SchedulerConfig
from scheduler.costs import CostModel
from scheduler.lengths import Lengths
from scheduler.policies import Policy, make_policy
from scheduler.policies.static import StaticFeedbackQueue
from scheduler.types import Request, Sequence
from tests.scheduler.driver import Driver, request

# One second per token, whatever its place.
COSTS = CostModel(step_s=0.0, slice_s=0.0, token_s=1.0, pair_s=0.0)
# The same, a hundred times faster: a prompt of 40 tokens has 0.4 s of work.
FAST = CostModel(step_s=0.0, slice_s=0.0, token_s=0.01, pair_s=0.0)


@dataclass(frozen=True)
class OneWork:
    tenant: str = ""
    priority: int = 0
    arrival_s: float = 0.0
    prompt_len: int = 4
    num_output: int = 0
    max_output: int = 16
    num_left: int = 4
    attained_s: float = 0.0
    level: int = 0
    expected_s: float = 0.0
    fcfs_s: float = 0.0


def arriving(prompt_len: int, arrival_s: float = 0.0, **fields: int) -> OneWork:
    return OneWork(prompt_len=prompt_len, num_left=prompt_len, arrival_s=arrival_s, **fields)


def policy_of(name: str, clock: ManualClock | None = None, **config: object) -> Policy:
    settings = SchedulerConfig(policy=name, max_num_batched_tokens=10_000, max_num_seqs=1, **config)  # type: ignore[arg-type]
    return make_policy(settings, COSTS, clock or ManualClock(), Lengths())


def placed(policy: Policy, work: OneWork) -> tuple[float, OneWork]:
    level = policy.level(work)
    return policy.key(level, work.arrival_s), replace(work, level=level)


def in_order(policy: Policy, *works: OneWork) -> list[OneWork]:
    return sorted(works, key=lambda work: placed(policy, work)[0])


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="lottery"):
        policy_of("lottery")


@pytest.mark.parametrize("name", POLICIES)
@given(prompts=st.lists(st.integers(1, 3000), min_size=2, max_size=6), gap_s=st.floats(0.1, 50.0))
def test_within_a_level_the_earlier_arrival_is_first(name: str, prompts: list[int], gap_s: float) -> None:
    policy = policy_of(name, ManualClock(1e4))
    for prompt in prompts:
        level = policy.level(arriving(prompt, 100.0))
        assert policy.key(level, 100.0) < policy.key(level, 100.0 + gap_s)


def test_fcfs_is_the_order_of_arrival_whatever_the_work() -> None:
    late, early = arriving(1, 2.0), arriving(3000, 1.0)
    policy = policy_of("fcfs")
    assert in_order(policy, late, early) == [early, late]
    assert not policy.preemptive
    assert policy.max_head_start_s == 0.0


def test_a_lower_priority_number_is_first_and_then_the_arrival() -> None:
    policy = policy_of("priority")
    urgent, early, late = arriving(4, 9e5, priority=-1), arriving(4, 1.0), arriving(4, 2.0)
    assert in_order(policy, late, early, urgent) == [urgent, early, late]
    assert policy.preemptive


@pytest.mark.parametrize(("priority", "as_if"), [(10**9, 1000), (-(10**9), -1000)])
def test_priorities_are_bounded(priority: int, as_if: int) -> None:
    policy = policy_of("priority")
    assert policy.level(arriving(4, priority=priority)) == policy.level(arriving(4, priority=as_if))


def test_hrrn_prefers_the_short_one_until_the_long_one_has_waited_enough() -> None:
    clock = ManualClock()
    policy = policy_of("hrrn", clock)
    long, short = arriving(100, 0.0), arriving(10, 20.0)
    clock.advance(22.0)  # ratios: 22 / 100 and 2 / 10
    assert in_order(policy, long, short) == [long, short]
    clock.advance(10.0)  # 32 / 100 and 12 / 10
    assert in_order(policy, long, short) == [short, long]


def test_hrrn_keeps_its_level_over_a_preemption() -> None:
    """What a preempted sequence has to compute again is not its size."""
    policy = policy_of("hrrn")
    level = policy.level(arriving(100))
    assert policy.level(OneWork(prompt_len=100, num_left=0, num_output=3, level=level)) == level


@pytest.mark.parametrize("policy", ["mlfq", "mlfq-static", "srpt"])
def test_output_that_was_delivered_before_a_crash_is_computed_like_a_prompt(policy: str) -> None:
    order = policy_of(policy)
    work = OneWork(prompt_len=40, num_output=500, max_output=600, num_left=540)
    assert order.level(work) > order.level(replace(work, num_left=0))


def test_hrrn_places_what_comes_with_output_by_its_prompt() -> None:
    order = policy_of("hrrn")
    assert order.level(OneWork(prompt_len=100, num_left=103, num_output=3)) == order.level(arriving(100))


def test_srpt_takes_the_least_remaining_service() -> None:
    policy = policy_of("srpt")
    short, long = arriving(10, 5.0, max_output=10), arriving(10, 1.0, max_output=100)
    nearly_done = OneWork(arrival_s=9.0, prompt_len=10, num_left=0, num_output=95, max_output=100)
    assert in_order(policy, long, short, nearly_done) == [nearly_done, short, long]


def test_srpt_rises_as_it_is_served_and_is_asked_again_in_time() -> None:
    policy = policy_of("srpt")
    work = OneWork(prompt_len=10, num_left=0, max_output=1000)
    num_output, levels, asked = 0, [policy.level(work)], 0
    while num_output < 999:
        num_output = int(policy.next_change(replace(work, num_output=num_output)))
        levels.append(policy.level(replace(work, num_output=min(num_output, 999))))
        asked += 1
    assert levels == sorted(levels, reverse=True)
    assert max(before - after for before, after in pairwise(levels)) <= 8
    assert asked < 100  # a tenth of what is left at a time: not at every token


# The queue with fixed quanta


def static(num_levels: int = 4, quantum_s: float = 4.0) -> StaticFeedbackQueue:
    return StaticFeedbackQueue(quantum_s, num_levels, 9.0, COSTS, chunk=10_000, places=1)


@pytest.mark.parametrize(("prompt", "level"), [(4, 0), (5, 1), (8, 1), (9, 2), (16, 2), (1000, 3)])
def test_a_sequence_joins_where_its_prefill_puts_it(prompt: int, level: int) -> None:
    assert static().level(arriving(prompt)) == level


def test_what_was_found_computed_shortens_the_prediction() -> None:
    assert static().level(OneWork(prompt_len=1000, num_left=4)) == 0


def test_a_sequence_sinks_with_the_service_it_has_had_and_never_rises() -> None:
    policy = static(num_levels=3)
    levels = [policy.level(OneWork(num_left=0, attained_s=float(s))) for s in range(1, 13)]
    assert levels == [0] * 4 + [1] * 4 + [2] * 4
    assert policy.level(OneWork(num_left=0, attained_s=1.0, level=2)) == 2


def test_it_is_asked_again_no_later_than_its_quantum_ends() -> None:
    """One second per token: at level 1, with 5 of 8 s attained, the level holds for 3 more tokens."""
    policy = static()
    work = OneWork(num_left=0, num_output=1, attained_s=5.0, level=1)
    assert policy.next_change(work) == 4
    assert policy.level(replace(work, num_output=4, attained_s=8.0)) == 1
    assert policy.level(replace(work, num_output=5, attained_s=9.0)) == 2
    assert policy.next_change(replace(work, level=3)) == float("inf")


def test_where_nothing_costs_anything_no_level_is_left() -> None:
    free = CostModel(step_s=0.0, slice_s=0.0, token_s=0.0, pair_s=0.0)
    policy = StaticFeedbackQueue(1.0, 4, 9.0, free, chunk=512, places=4)
    assert policy.level(arriving(1000)) == 0
    assert policy.next_change(OneWork(num_left=0, num_output=1)) == float("inf")


def test_head_starts_fall_from_the_largest_to_none() -> None:
    assert [100.0 - static().key(level, 100.0) for level in range(4)] == [9.0, 6.0, 3.0, 0.0]


_ARRIVALS = st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1e4)), min_size=2, max_size=8)


@given(st.integers(1, 8), _ARRIVALS)
def test_nobody_is_overtaken_by_someone_much_younger(levels: int, drawn: list[tuple[int, float]]) -> None:
    policy = static(levels, quantum_s=0.05)
    works = in_order(policy, *[arriving(prompt, arrival_s) for prompt, arrival_s in drawn])
    for k, late in enumerate(works):
        for early in works[:k]:
            assert early.arrival_s - late.arrival_s <= policy.max_head_start_s + 1e-9


# In a scheduler


def preemptive_driver(**config: object) -> Driver:
    settings = {"policy": "mlfq-static", "max_num_batched_tokens": 64, "num_pages": 32}
    return Driver(costs=FAST, **{**settings, "static_quantum_s": 0.1, "max_num_seqs": 1, **config})


def test_a_short_request_takes_the_place_of_a_long_one() -> None:
    driver = preemptive_driver()
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 4, max_tokens=2, arrival_s=1.0))
    plan = driver.plan()
    assert [(one.seq_id, one.reason, one.for_seq_id) for one in plan.preempted] == [(0, "place", 1)]
    assert [driver.names[piece.seq_id] for piece in plan.slices] == ["short.0"]
    driver.apply(plan)
    driver.finish()
    stats = driver.scheduler.stats()
    assert (stats.num_preempted_for_places, stats.num_preempted_for_pages) == (1, 0)


def test_a_sequence_put_aside_finds_its_pages_again() -> None:
    driver = preemptive_driver()
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 4, max_tokens=2, arrival_s=1.0))
    assert [list(driver.step()) for _ in range(2)] == [["short.0"], ["short.0"]]
    resumed = driver.step()["long.0"]
    assert resumed.first_new_page == 0
    assert (resumed.start, resumed.new_pages[:10]) == (40, tuple(range(10)))
    assert driver.scheduler.stats().num_resumed_kept == 1


def test_a_short_request_takes_the_pages_of_a_long_one() -> None:
    driver = preemptive_driver(max_num_seqs=4, num_pages=12)
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 12, max_tokens=2, arrival_s=1.0))
    assert list(driver.step()) == ["short.0"]
    assert driver.scheduler.stats().num_preempted_for_pages == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_is_put_aside_while_everything_fits(policy: str) -> None:
    driver = preemptive_driver(policy=policy, max_num_seqs=4)
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 4, max_tokens=2, arrival_s=1.0, priority=-1))
    assert set(driver.step()) == {"long.0", "short.0"}
    driver.finish()
    assert driver.scheduler.stats().num_preemptions == 0


@pytest.mark.parametrize("policy", ["fcfs", "hrrn"])
def test_nobody_loses_a_place_under_an_order_without_preemption(policy: str) -> None:
    driver = preemptive_driver(policy=policy)
    driver.add(request("late", 40, max_tokens=8, arrival_s=5.0))
    driver.step()
    driver.add(request("early", 4, max_tokens=2, arrival_s=1.0))
    driver.finish()
    assert driver.scheduler.stats().num_preemptions == 0


def test_someone_far_too_young_waits_however_short() -> None:
    driver = preemptive_driver(static_max_head_start_s=10.0)
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 4, max_tokens=2, arrival_s=10.5))
    assert list(driver.step()) == ["long.0"]


def test_nobody_is_put_aside_for_a_gain_smaller_than_being_restored() -> None:
    """40 tokens cost 0.4 s to compute again; a lead of 0.3 s in the order is not worth that, 0.5 s is.
    Two levels: a head start of 10 s, so `short` leads by 10 s less its later arrival."""
    leads = {}
    for lead_s in (0.3, 0.5):
        driver = preemptive_driver(static_levels=2, static_max_head_start_s=10.0)
        driver.add(request("long", 40, max_tokens=8))
        driver.step()
        driver.add(request("short", 4, max_tokens=2, arrival_s=10.0 - lead_s))
        leads[lead_s] = list(driver.step())
    assert leads == {0.3: ["long.0"], 0.5: ["short.0"]}


def _request(**fields: object) -> Request:
    return request("a", 4, **fields)


def test_a_sequence_is_the_work_that_policies_ask_for() -> None:
    one = _request(tenant="t", priority=3, arrival_s=2.0)
    sequence = Sequence(0, one, 0, [*one.prompt_ids, 7], num_known=4, max_output=16)
    assert (sequence.tenant, sequence.priority, sequence.arrival_s) == ("t", 3, 2.0)
    assert (sequence.prompt_len, sequence.num_output, sequence.num_left) == (4, 1, 4)
    sequence.num_reached = 3
    assert sequence.num_left == 1
    sequence.num_found = 9
    assert sequence.num_left == 0
