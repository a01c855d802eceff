"""The checker must notice: each test breaks one fact of a sound scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scheduler.invariants import check, check_decisions, check_empty
from scheduler.plan import Preempted, StepPlan
from tests.scheduler.driver import Driver, request

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.scheduler import Scheduler


def _busy() -> Scheduler:
    driver = Driver(policy="mlfq", max_num_seqs=2, num_pages=32, host_pages=4)
    driver.add(request("done", 8, max_tokens=1))
    driver.finish()
    driver.add(request("a", 9, max_tokens=9, deadline_s=5.0), request("b", 9), request("c", 9, num_choices=2))
    driver.step()
    return driver.scheduler


def _lose_a_free_page(scheduler: Scheduler) -> None:
    scheduler._pool.free.pop()


def _free_a_held_page(scheduler: Scheduler) -> None:
    scheduler._pool.free.append(scheduler.sequence(1).pages[-1])


def _miscount_references(scheduler: Scheduler) -> None:
    scheduler._pool.references[scheduler.sequence(1).pages[0]] += 1


def _swap_two_keys(scheduler: Scheduler) -> None:
    pages = scheduler.sequence(1).pages
    keys = scheduler._pool.key_of
    keys[pages[0]], keys[pages[1]] = keys[pages[1]], keys[pages[0]]
    scheduler._pool.page_of.update({key: page for page, key in keys.items()})


def _change_a_committed_token(scheduler: Scheduler) -> None:
    scheduler.sequence(1).tokens[0] += 1


def _compute_beyond_the_pages(scheduler: Scheduler) -> None:
    sequence = scheduler.sequence(1)
    sequence.tokens += [1] * 8
    sequence.num_computed += 4


def _wait_and_run(scheduler: Scheduler) -> None:
    scheduler._places.waiting.push(scheduler.sequence(1))


def _leave_all_queues(scheduler: Scheduler) -> None:
    scheduler._places.waiting.discard(scheduler.sequence(3))


def _wait_at_another_level(scheduler: Scheduler) -> None:
    scheduler.sequence(3).level += 1


def _charge_a_stranger(scheduler: Scheduler) -> None:
    scheduler._tenants.active[""].num_running += 1


def _park_for_nothing(scheduler: Scheduler) -> None:
    scheduler._places.park(scheduler.sequence(3))


def _lose_a_host_page(scheduler: Scheduler) -> None:
    scheduler._tiers.host.free.pop()


def _hold_a_page_while_waiting(scheduler: Scheduler) -> None:
    scheduler.sequence(3).pages += scheduler._pool.take(1)


def _forget_a_deadline(scheduler: Scheduler) -> None:
    scheduler._deadlines.discard(1)


def _publish_a_private_page(scheduler: Scheduler) -> None:
    scheduler._pool.register(scheduler.sequence(1).pages[-1], b"unfinished")


@pytest.mark.parametrize(
    ("break_it", "fact"),
    [
        (_lose_a_free_page, "lost"),
        (_free_a_held_page, "in two places"),
        (_miscount_references, "references"),
        (_swap_two_keys, "found as other content"),
        (_change_a_committed_token, "prompt has changed"),
        (_compute_beyond_the_pages, "computed beyond its pages"),
        (_wait_and_run, "in two queues"),
        (_leave_all_queues, "in no queue"),
        (_wait_at_another_level, "miscounted by level"),
        (_charge_a_stranger, "tenant '' runs"),
        (_park_for_nothing, "parked for nothing"),
        (_lose_a_host_page, "a page of a tier is lost"),
        (_hold_a_page_while_waiting, "holds pages while it waits"),
        (_forget_a_deadline, "deadlines"),
        (_publish_a_private_page, "private page"),
    ],
)
def test_a_broken_fact_is_named(break_it: Callable[[Scheduler], None], fact: str) -> None:
    scheduler = _busy()
    check(scheduler)
    break_it(scheduler)
    with pytest.raises(AssertionError, match=fact):
        check(scheduler)


def test_what_is_left_over_is_noticed() -> None:
    with pytest.raises(AssertionError, match="work is left"):
        check_empty(_busy())


def test_overtaking_beyond_the_bound_is_noticed() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add(request("old", arrival_s=1.0), request("young", arrival_s=2.0))
    places = driver.scheduler._places
    places.seat(driver.scheduler.sequence(1), [])
    with pytest.raises(AssertionError, match="overtaken"):
        check_decisions(driver.scheduler, StepPlan(1, ()), set(), {0, 1})


def test_giving_way_to_a_later_one_is_noticed() -> None:
    driver = Driver()
    driver.add(request("old", arrival_s=1.0), request("young", arrival_s=2.0))
    plan = driver.plan()
    wrong = StepPlan(1, plan.slices[1:], preempted=(Preempted(0, "place", 1),))
    with pytest.raises(AssertionError, match="gave way"):
        check_decisions(driver.scheduler, wrong, {0, 1}, set())
