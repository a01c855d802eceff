"""The queue: levels, tenants, limits, the overdue; and that its size does not matter."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.policies.simple import FirstComeFirstServed
from scheduler.policies.static import StaticFeedbackQueue
from scheduler.tenants import Tenant, Tenants
from scheduler.types import Sequence
from scheduler.waiting import WaitingQueue
from tests.scheduler.driver import Driver, request
from tests.scheduler.test_policies import COSTS

HEAD_START_S = 10.0  # of level 0; level 1 has none


class Queue:
    """A queue of two levels, and its sequences by number."""

    def __init__(self, max_running: int = 0, weights: dict[str, float] | None = None) -> None:
        self.tenants = Tenants(weights or {}, max_running)
        policy = StaticFeedbackQueue(1.0, 2, HEAD_START_S, COSTS, 100, 1)
        self.waiting = WaitingQueue(policy, self.tenants)
        self.number = 0

    def push(self, arrival_s: float, level: int = 1, tenant: str = "", overdue: bool = False) -> Sequence:
        self.tenants.enter(tenant)
        one = request("a", 4, arrival_s=arrival_s, tenant=tenant)
        sequence = Sequence(self.number, one, 0, [1], level=level, is_overdue=overdue)
        self.number += 1
        self.waiting.push(sequence)
        return sequence

    def pop(self) -> Sequence | None:
        first = self.waiting.first()
        if first is not None:
            self.waiting.discard(first)
        return first

    def served(self, tenant: str, seconds: float) -> None:
        self.tenants.charge(tenant, seconds)

    def runs(self, tenant: str, change: int) -> Tenant:
        entry = self.tenants.active[tenant]
        entry.num_running += change
        self.waiting.tenant_changed(entry)
        return entry


def test_levels_are_head_starts_and_not_precedence() -> None:
    queue = Queue()
    old, soon, late = queue.push(0.0), queue.push(9.0, level=0), queue.push(11.0, level=0)
    assert [queue.pop(), queue.pop(), queue.pop(), queue.pop()] == [soon, old, late, None]
    assert not queue.waiting._levels


def test_of_a_level_the_least_served_tenant_is_first() -> None:
    queue = Queue()
    queue.push(1.0, tenant="greedy")
    modest = queue.push(2.0, tenant="modest")
    queue.served("greedy", 5.0)
    queue.served("modest", 1.0)
    assert queue.waiting.first() is modest
    queue.served("modest", 5.0)
    assert queue.waiting.first() is not modest


def test_a_tenants_turn_goes_to_its_first_of_any_level() -> None:
    """The level whose head is earliest gives the turn to a tenant, and the tenant's own order holds."""
    queue = Queue()
    queue.push(0.0, level=1, tenant="greedy")
    queue.push(1.0, level=1, tenant="modest")
    short = queue.push(10.5, level=0, tenant="modest")  # key 0.5, before its tenant's other
    queue.served("greedy", 5.0)
    assert queue.waiting.first() is short


def test_the_overdue_go_first_by_arrival() -> None:
    queue = Queue()
    queue.push(0.0, level=0)
    second, first = queue.push(7.0, overdue=True), queue.push(3.0, overdue=True)
    assert queue.waiting.order(first)[0] < queue.waiting.order(queue.push(-1e9, level=0))[0]
    assert [queue.pop(), queue.pop()] == [first, second]


def test_a_tenant_that_runs_enough_is_passed_over_until_one_ends() -> None:
    queue = Queue(max_running=1)
    for tenant in ("a", "b"):
        queue.tenants.enter(tenant)
    first, second = queue.push(0.0, tenant="a"), queue.push(1.0, tenant="b")
    queue.runs("a", 1)
    assert queue.waiting.first() is second
    queue.runs("b", 1)
    assert queue.waiting.first() is None
    queue.runs("a", -1)
    assert queue.waiting.first() is first


def test_the_limit_holds_for_the_overdue_too() -> None:
    queue = Queue(max_running=1)
    queue.tenants.enter("a")
    queue.push(0.0, tenant="a", overdue=True)
    other = queue.push(1.0, tenant="b")
    queue.runs("a", 1)
    assert queue.waiting.first() is other


_PUSHES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 3.0, 7.25, 20.0]),
        st.integers(0, 1),
        st.sampled_from("abc"),
        st.booleans(),
        st.floats(0, 9),
    ),
    min_size=1,
    max_size=12,
)


@given(_PUSHES)
def test_the_first_is_the_one_that_the_rule_names(drawn: list[tuple[float, int, str, bool, float]]) -> None:
    queue, all_of_them = Queue(), []
    for arrival_s, level, tenant, overdue, served_s in drawn:
        all_of_them.append(queue.push(arrival_s, level, tenant, overdue))
        queue.served(tenant, served_s)
    while all_of_them:
        first = queue.pop()
        assert first is not None
        late = [one for one in all_of_them if one.is_overdue]
        if late:
            assert first is min(late, key=lambda one: (one.arrival_s, one.seq_id))
        else:
            _check_rule(queue, first, all_of_them)
        all_of_them = [one for one in all_of_them if one is not first]


def _check_rule(queue: Queue, first: Sequence, waiting: list[Sequence]) -> None:
    order, active = queue.waiting.order, queue.tenants.active
    head_key = min(order(one)[0] for one in waiting)
    at_head = {one.level for one in waiting if order(one)[0] == head_key}
    least = {min(active[one.tenant].served_s for one in waiting if one.level == level) for level in at_head}
    assert active[first.tenant].served_s in least
    assert order(first) == min(order(one) for one in waiting if one.tenant == first.tenant)


def test_ten_thousand_tenants_cost_no_more_per_turn() -> None:
    """Counted, not timed: a turn looks at few counters, however many tenants wait."""
    rng = random.Random(0)

    def counters_read(num_tenants: int) -> int:
        queue = Queue()
        for number in range(num_tenants):
            for _ in range(2):
                queue.push(rng.random(), level=number % 2, tenant=f"t{number}")
        read = 0
        original = queue.tenants.served_s

        def counting(number: int) -> float | None:
            nonlocal read
            read += 1
            return original(number)

        queue.tenants.served_s = counting  # type: ignore[method-assign]
        for _ in range(500):
            first = queue.pop()
            assert first is not None
            queue.served(first.tenant, rng.random())
        return read

    assert counters_read(10_000) < 4 * counters_read(300)


# In a scheduler


def test_a_tenant_never_runs_more_than_it_may() -> None:
    driver = Driver(max_tenant_running=2, max_num_seqs=4)
    driver.add(*[request(f"a{k}", max_tokens=4, tenant="a") for k in range(4)])
    driver.add(request("b", max_tokens=4, tenant="b", arrival_s=9.0))
    assert set(driver.step()) == {"a0.0", "a1.0", "b.0"}
    ends = [news.request_id for news in driver.finish() if news.finish]
    assert sorted(ends) == ["a0", "a1", "a2", "a3", "b"]


@pytest.mark.parametrize("preset", [0.0, 30.0])
def test_fcfs_with_one_tenant_is_strictly_by_arrival(preset: float) -> None:
    tenants = Tenants({})
    waiting = WaitingQueue(FirstComeFirstServed(), tenants)
    rng = random.Random(1)
    for number in range(50):
        tenants.enter("")
        tenants.charge("", preset)
        one = request("a", arrival_s=rng.random())
        waiting.push(Sequence(number, one, 0, [1]))
    arrivals = []
    while (first := waiting.first()) is not None:
        waiting.discard(first)
        arrivals.append(first.arrival_s)
    assert arrivals == sorted(arrivals)


def test_the_default_configuration_has_no_limit_on_tenants() -> None:
    assert SchedulerConfig().max_tenant_running == 0
