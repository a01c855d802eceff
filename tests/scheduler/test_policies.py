from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.policies import FeedbackQueue, LinearCost, make_policy
from scheduler.types import Sequence
from tests.scheduler.driver import Driver, request

COST = LinearCost(token_s=1.0, step_s=0.0)


def sequence(prompt: int = 4, arrival_s: float = 0.0, seq_id: int = 0) -> Sequence:
    one = request("a", prompt, arrival_s=arrival_s)
    return Sequence(seq_id, one, 0, list(one.prompt_ids))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="lottery"):
        make_policy(SchedulerConfig(policy="lottery"))


def test_fcfs_orders_by_arrival_then_number() -> None:
    policy = make_policy(SchedulerConfig(policy="fcfs"))
    three = [sequence(arrival_s=1.0, seq_id=2), sequence(arrival_s=1.0, seq_id=1), sequence(seq_id=3)]
    assert [one.seq_id for one in sorted(three, key=policy.order)] == [3, 1, 2]


@pytest.mark.parametrize(("prompt", "level"), [(4, 0), (5, 1), (8, 1), (9, 2), (16, 2), (1000, 3)])
def test_a_sequence_joins_where_its_prefill_puts_it(prompt: int, level: int) -> None:
    policy = FeedbackQueue(quantum_s=4.0, num_levels=4, max_head_start_s=9.0, cost=COST)
    one = sequence(prompt)
    policy.enter(one, num_cached=0)
    assert one.level == level


def test_what_is_in_the_cache_shortens_the_prediction() -> None:
    policy = FeedbackQueue(quantum_s=4.0, num_levels=4, max_head_start_s=9.0, cost=COST)
    one = sequence(1000)
    policy.enter(one, num_cached=996)
    assert one.level == 0


def test_a_sequence_sinks_with_the_service_it_has_had() -> None:
    policy = FeedbackQueue(quantum_s=4.0, num_levels=3, max_head_start_s=9.0, cost=COST)
    one = sequence(4)
    policy.enter(one, num_cached=0)
    one.num_reached = 4
    levels = []
    for _ in range(12):
        policy.charge(one, 1)
        levels.append(one.level)
    assert levels == [0] * 4 + [1] * 4 + [2] * 4


def test_head_starts_fall_from_the_largest_to_none() -> None:
    policy = FeedbackQueue(quantum_s=4.0, num_levels=4, max_head_start_s=9.0, cost=COST)
    one = sequence(arrival_s=100.0)
    head_starts = []
    for level in range(4):
        one.level = level
        head_starts.append(100.0 - policy.order(one)[0])
    assert head_starts == [9.0, 6.0, 3.0, 0.0]


_ARRIVALS = st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1e4)), min_size=2, max_size=8)


@given(st.integers(1, 8), _ARRIVALS)
def test_nobody_is_overtaken_by_someone_much_younger(levels: int, drawn: list[tuple[int, float]]) -> None:
    policy = FeedbackQueue(quantum_s=0.05, num_levels=levels, max_head_start_s=10.0)
    all_of_them = [sequence(prompt, arrival, k) for k, (prompt, arrival) in enumerate(drawn)]
    for one in all_of_them:
        policy.enter(one, num_cached=0)
    in_order = sorted(all_of_them, key=policy.order)
    for k, late in enumerate(in_order):
        for early in in_order[:k]:
            assert early.request.arrival_s - late.request.arrival_s <= policy.max_head_start_s + 1e-9


def _mlfq(**config: object) -> Driver:
    return Driver(**{"policy": "mlfq", "max_num_batched_tokens": 64, "num_pages": 32, **config})


def test_a_short_request_takes_the_place_of_a_long_one() -> None:
    driver = _mlfq(max_num_seqs=1, mlfq_quantum_s=0.02)
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 4, max_tokens=2, arrival_s=1.0))
    plan = driver.plan()
    assert plan.preempted == (0,)
    assert [driver.names[piece.seq_id] for piece in plan.slices] == ["short.0"]
    driver.apply(plan)
    driver.finish()
    assert driver.scheduler.stats().num_preemptions == 1


def test_a_sequence_put_aside_finds_its_pages_again() -> None:
    driver = _mlfq(max_num_seqs=1, mlfq_quantum_s=0.02)
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 4, max_tokens=2, arrival_s=1.0))
    assert [list(driver.step()) for _ in range(2)] == [["short.0"], ["short.0"]]
    resumed = driver.step()["long.0"]
    assert resumed.first_new_page == 0
    assert (resumed.start, resumed.new_pages[:10]) == (40, tuple(range(10)))


def test_a_short_request_takes_the_pages_of_a_long_one() -> None:
    driver = _mlfq(max_num_seqs=4, mlfq_quantum_s=0.02, num_pages=12)
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 12, max_tokens=2, arrival_s=1.0))
    assert list(driver.step()) == ["short.0"]


def test_nobody_is_put_aside_while_everything_fits() -> None:
    driver = _mlfq(mlfq_quantum_s=0.02)
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 4, max_tokens=2, arrival_s=1.0))
    assert set(driver.step()) == {"long.0", "short.0"}
    driver.finish()
    assert driver.scheduler.stats().num_preemptions == 0


def test_under_fcfs_nobody_loses_a_place() -> None:
    driver = Driver(max_num_seqs=1, num_pages=32)
    driver.add(request("late", 40, max_tokens=8, arrival_s=5.0))
    driver.step()
    driver.add(request("early", 4, max_tokens=2, arrival_s=1.0))
    driver.finish()
    assert driver.scheduler.stats().num_preemptions == 0


def test_someone_far_too_young_waits_however_short() -> None:
    driver = _mlfq(max_num_seqs=1, mlfq_quantum_s=0.02, mlfq_max_head_start_s=10.0)
    driver.add(request("long", 40, max_tokens=8))
    driver.step()
    driver.add(request("short", 4, max_tokens=2, arrival_s=10.5))
    assert list(driver.step()) == ["long.0"]
