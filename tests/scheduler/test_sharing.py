"""Common prefixes: computed once, waited for by those behind, and named in the plan."""

from __future__ import annotations

import pytest

from scheduler.invariants import check_empty
from scheduler.plan import Advance
from scheduler.types import FinishReason, SequenceState
from tests.scheduler.driver import Driver, request

STEM = tuple(range(500, 524))  # 6 pages of 4


def _driver(**config: object) -> Driver:
    return Driver(**{"num_pages": 64, "min_shared_tokens": 8, "max_num_batched_tokens": 64, **config})


def _asked(name: str, *tail: int, **fields: object) -> object:
    return request(name, STEM + tail, **{"max_tokens": 3, **fields})


def test_a_common_prefix_is_computed_once_and_both_go_on_from_its_end() -> None:
    driver = _driver()
    driver.add(_asked("a", 1, 2, 3), _asked("b", 4, 5, 6))
    first, second = driver.step(), driver.step()
    assert (set(first), set(second)) == ({"a.0"}, {"a.0", "b.0"})
    assert second["b.0"].start == 24
    assert driver.scheduler._places.num_parkings == 1


def test_who_is_parked_runs_as_soon_as_what_both_share_is_there() -> None:
    """`a` goes on alone with the rest of its prompt; `b` shares only the first 12 tokens."""
    driver = _driver(max_num_batched_tokens=8)
    driver.add(_asked("a", *range(16)), request("b", (*STEM[:12], 9, 9, 9), max_tokens=3))
    assert [set(driver.step()) for _ in range(3)] == [{"a.0"}, {"a.0"}, {"a.0"}]  # 8 tokens each
    parked = driver.scheduler.sequence(1)
    assert parked.state is not SequenceState.PARKED
    driver.finish()
    assert parked.num_cached == 12


def test_a_short_common_prefix_is_not_waited_for() -> None:
    driver = _driver(min_shared_tokens=32, max_num_batched_tokens=16)
    driver.add(_asked("a", 1), _asked("b", 2))
    driver.finish()
    assert driver.scheduler._places.num_parkings == 0


def test_under_another_salt_nobody_is_waited_for() -> None:
    driver = _driver()
    driver.add(_asked("a", 1), _asked("b", 2, cache_salt="other"))
    driver.finish()
    assert driver.scheduler._places.num_parkings == 0


@pytest.mark.parametrize("end", ["abort", "error"])
def test_when_the_one_that_computes_goes_the_one_behind_computes_itself(end: str) -> None:
    driver = _driver()
    driver.add(_asked("a", 1), _asked("b", 2))
    plan = driver.plan()
    behind = driver.scheduler.sequence(1)
    assert behind.state is SequenceState.PARKED
    if end == "abort":
        driver.scheduler.abort("a")
    driver.apply(plan, Advance(0, (), 0, error="no"))
    assert behind.state is SequenceState.WAITING
    assert driver.step()["b.0"].start == 0
    assert [news.finish for news in driver.finish() if news.finish] == [FinishReason.LENGTH]
    check_empty(driver.scheduler)


def test_who_is_aborted_while_parked_leaves_nothing_behind() -> None:
    driver = _driver()
    driver.add(_asked("a", 1), _asked("b", 2))
    plan = driver.plan()
    assert driver.scheduler.sequence(1).state is SequenceState.PARKED
    assert [news.finish for news in driver.scheduler.abort("b")] == [FinishReason.ABORT]
    assert driver.scheduler.stats().num_parked == 0
    ends = [*driver.apply(plan), *driver.finish()]
    assert [(news.request_id, news.finish) for news in ends if news.finish] == [("a", FinishReason.LENGTH)]
    check_empty(driver.scheduler)


def test_the_plan_names_who_shares_which_pages() -> None:
    driver = _driver(num_pages=64, max_num_batched_tokens=64)
    driver.add(_asked("a", 1, 2, 3, max_tokens=9))
    driver.step()
    driver.add(_asked("b", 4, 5, 6, max_tokens=9), request("c", 30, max_tokens=9))
    driver.step()
    plan = driver.plan()
    (group,) = plan.shared
    assert (group.num_pages, set(group.seq_ids)) == (6, {0, 1})
    assert len(plan.slices) == 3
    driver.apply(plan)
    driver.scheduler.abort("a")
    assert driver.plan().shared == ()


def test_a_group_is_as_long_as_what_all_of_it_share() -> None:
    driver = _driver(max_num_batched_tokens=64, max_num_seqs=4)
    driver.add(_asked("a", 1, 2, 3, 4, 5, max_tokens=9))
    driver.step()
    driver.add(_asked("b", 1, 2, 3, 4, 6, max_tokens=9), request("c", (*STEM[:12], 9), max_tokens=9))
    driver.step()
    (group,) = driver.plan().shared
    assert (group.num_pages, set(group.seq_ids)) == (3, {0, 1, 2})


def test_pages_that_are_being_computed_are_in_no_group() -> None:
    driver = _driver(max_num_batched_tokens=64)
    driver.add(_asked("a", 1, max_tokens=9))
    assert driver.plan().shared == ()


def test_a_queue_that_shares_one_prefix_is_not_parked_as_a_whole() -> None:
    """A plan costs the same however many of the queue wait for the same prefix."""
    driver = _driver(max_num_seqs=4)
    driver.add(*[_asked(f"r{k}", k) for k in range(40)])
    plan = driver.plan()
    assert driver.scheduler.stats().num_parked == 8
    driver.apply(plan)
    assert len(driver.step()) == 4
    assert sum(news.finish is FinishReason.LENGTH for news in driver.finish()) == 40
