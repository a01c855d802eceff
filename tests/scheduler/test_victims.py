"""Who gives way, for whom, and for how long."""

from __future__ import annotations

import pytest

from scheduler.costs import CostModel
from scheduler.types import FinishReason
from tests.scheduler.driver import TOKEN, Driver, request

COSTS = CostModel(step_s=0.0, slice_s=0.0, token_s=0.01, pair_s=0.0)


def _driver(**config: object) -> Driver:
    settings = {"policy": "priority", "num_pages": 32, "max_num_seqs": 8, "max_num_batched_tokens": 128}
    return Driver(costs=COSTS, **{**settings, "reserve_share": 0.0, **config})


def _victims(driver: Driver) -> list[tuple[str, str]]:
    """One step; who was put aside and why."""
    plan = driver.plan()
    driver.apply(plan)
    return [(driver.names[one.seq_id], one.reason) for one in plan.preempted]


def test_the_lowest_level_gives_pages_first_and_there_the_cheapest_to_restore() -> None:
    driver = _driver(num_pages=30, max_num_seqs=16)
    driver.add(
        request("cheap but high", 4, max_tokens=30, priority=1),
        request("long", 48, max_tokens=16, priority=5, arrival_s=1.0),
        request("short", 16, max_tokens=16, priority=5, arrival_s=2.0),
        request("middle", 24, max_tokens=16, priority=5, arrival_s=3.0),
    )
    driver.step()
    driver.add(request("urgent", 12, max_tokens=1, priority=0, arrival_s=4.0))
    assert _victims(driver) == [("short.0", "pages"), ("middle.0", "pages")]


def test_the_last_of_the_order_gives_pages_first_where_asked_for() -> None:
    driver = _driver(num_pages=30, victims="last")
    driver.add(
        request("long", 48, max_tokens=16, priority=5, arrival_s=1.0),
        request("short", 16, max_tokens=16, priority=5, arrival_s=2.0),
        request("middle", 24, max_tokens=16, priority=5, arrival_s=3.0),
    )
    driver.step()
    driver.add(request("urgent", 28, max_tokens=1, priority=0, arrival_s=4.0))
    assert _victims(driver) == [("middle.0", "pages")]


def test_for_a_place_the_last_of_the_order_goes_whatever_it_costs() -> None:
    driver = _driver(max_num_seqs=2)
    driver.add(request("short", 4, max_tokens=9, priority=5), request("long", 40, max_tokens=9, priority=6))
    driver.step()
    driver.add(request("urgent", 4, max_tokens=1, priority=0))
    assert _victims(driver) == [("long.0", "place")]


def test_what_lies_on_the_host_costs_less_to_restore() -> None:
    """Of two alike, the one whose pages were copied down gives way."""
    driver = _driver(num_pages=30, host_pages=30)
    driver.add(
        request("copied", 32, max_tokens=16, priority=5, arrival_s=1.0),
        request("later", 28, max_tokens=16, priority=5, arrival_s=2.0),
    )
    driver.step()
    planner, places = driver.scheduler._planner, driver.scheduler._places
    copied, later = driver.scheduler.sequence(0), driver.scheduler.sequence(1)
    assert planner._restore_s(copied) > planner._restore_s(later)
    driver.scheduler._tiers.put_aside(copied.pages, 0.0)
    while copies := driver.scheduler._tiers.take_copies():
        driver.under_way += copies
        driver.land()
    assert planner._restore_s(copied) < planner._restore_s(later)
    chosen, _ = planner._choose(places.by_policy(), cheapest=True)
    assert chosen is copied


def test_nobody_is_put_aside_if_that_would_not_make_enough_room() -> None:
    """Only `low` comes after the newcomer, and its pages do not suffice: it keeps them."""
    driver = _driver(num_pages=16)
    driver.add(request("high", 40, max_tokens=9, priority=0), request("low", 4, max_tokens=9, priority=5))
    driver.step()
    driver.add(request("wide", 36, max_tokens=1, priority=3))
    assert _victims(driver) == []
    assert driver.scheduler.stats().num_running == 2


def test_the_reserve_is_kept_from_those_behind_and_open_to_those_ahead() -> None:
    newcomers = {}
    for priority in (0, 9):
        driver = _driver(num_pages=20, reserve_share=0.5)
        driver.add(request("runs", 20, max_tokens=9, priority=5))
        driver.step()
        driver.add(request("new", 16, max_tokens=1, priority=priority))
        newcomers[priority] = "new.0" in driver.step()
    assert newcomers == {0: True, 9: False}


def test_alone_a_sequence_may_have_the_reserve() -> None:
    driver = _driver(num_pages=8, reserve_share=0.9)
    driver.add(request("a", 28, max_tokens=4))
    assert driver.finish()[-1].finish is FinishReason.LENGTH


# Pauses


def test_who_was_put_aside_for_too_long_goes_first_and_is_put_aside_no_more() -> None:
    driver = _driver(max_num_seqs=1, max_pause_s=5.0)
    driver.add(request("low", 4, max_tokens=30, priority=9))
    driver.step()
    for number in range(9):  # without a bound, these would go first for ever
        driver.add(request(f"urgent{number}", 4, max_tokens=3, priority=0, arrival_s=1.0))
    ran = []
    for _ in range(30):
        driver.clock.advance(1.0)
        ran += list(driver.step())
    assert ran[:5] == ["urgent0.0"] * 3 + ["urgent1.0"] * 2  # put aside at 1 s, overdue at 6 s
    assert set(ran[5:30]) == {"low.0"}
    stats = driver.scheduler.stats()
    assert stats.num_preemptions == 2  # for urgent0, and of urgent1 for the overdue one
    assert stats.longest_pause_s == pytest.approx(5.0)


def test_who_is_overdue_waits_for_a_place_where_restoring_costs_much() -> None:
    driver = _driver(max_num_seqs=1, max_pause_s=0.05)
    driver.add(request("low", 4, max_tokens=30, priority=9))
    driver.step()
    driver.add(*(request(f"urgent{n}", 4, max_tokens=3, priority=0, arrival_s=1.0) for n in range(3)))
    ran = []
    for _ in range(7):
        driver.clock.advance(1.0)
        ran += list(driver.step())
    assert ran == ["urgent0.0"] * 3 + ["low.0"] * 4


def test_others_go_past_one_who_is_overdue_to_places_that_are_not_free() -> None:
    """Its own turn comes when a place is free; nobody else takes that one."""
    driver = _driver(max_num_seqs=16, num_pages=200, max_num_batched_tokens=1024, max_pause_s=0.5)
    driver.add(request("low", 20, max_tokens=9, priority=9))
    driver.step()
    driver.add(*(request(f"middle{n}", 20, max_tokens=30, priority=5, arrival_s=1.0) for n in range(16)))
    assert "low.0" not in driver.step()
    driver.clock.advance(1.0)
    driver.add(request("high", 4, max_tokens=2, priority=0, arrival_s=2.0))
    steps = [driver.step() for _ in range(3)]
    assert ["high.0" in step for step in steps] == [True, True, False]
    assert ["low.0" in step for step in steps] == [False, False, True]
    assert all("middle15.0" not in step for step in steps), "high has its place, then low"


def test_an_overdue_one_displaces_no_more_than_is_cheap_together() -> None:
    """Each of those behind costs 0.07 s to restore; 10 s / 2 / 50 = 0.1 s may be spent."""
    driver = _driver(
        max_model_len=200, num_pages=40, max_num_seqs=16, max_num_batched_tokens=512, max_pause_s=10.0
    )
    driver.add(request("big", 100, max_tokens=50, priority=9))
    driver.step()
    driver.add(request("urgent", 120, max_tokens=3, priority=0, arrival_s=1.0))
    driver.step()
    driver.add(*(request(f"s{n}", 7, max_tokens=50, priority=5, arrival_s=2.0) for n in range(12)))
    for _ in range(3):
        driver.step()
    driver.clock.advance(20.0)
    assert _victims(driver) == []


def test_who_never_had_a_place_does_not_become_overdue() -> None:
    driver = _driver(max_num_seqs=1, max_pause_s=1.0, policy="fcfs")
    driver.add(request("a", max_tokens=30), request("b", max_tokens=3))
    for _ in range(9):
        driver.clock.advance(1.0)
        driver.step()
    assert driver.scheduler.stats().num_overdue == 0


def test_the_pause_of_a_fetched_or_parked_sequence_counts_from_when_it_was_put_aside() -> None:
    driver = _driver(max_num_seqs=2, max_pause_s=5.0, host_pages=32)
    driver.add(request("low", 32, max_tokens=30, priority=9))
    driver.step()
    driver.set_aside(0)
    sequence = driver.scheduler.sequence(0)
    driver.scheduler._places.park(sequence)
    driver.clock.advance(6.0)
    driver.scheduler._places.call_overdue()
    assert sequence.is_overdue
    driver.scheduler._places.unpark(0)
    assert driver.scheduler._places.waiting.first() is sequence


def test_everything_is_said_once_under_every_choice_of_victims() -> None:
    for victims in ("cheapest", "last"):
        driver = _driver(num_pages=12, victims=victims)
        driver.add(*[request(f"r{k}", 8, max_tokens=20, priority=k % 3) for k in range(8)])
        news = driver.finish(2000)
        for k in range(8):
            tokens = [token for one in news if one.request_id == f"r{k}" for token in one.tokens]
            assert tokens == [TOKEN] * 20
