"""What is refused because of load, levels' counters, and what people may look at."""

from __future__ import annotations

import pytest

from scheduler.costs import CostModel
from scheduler.lengths import Lengths
from scheduler.levels import MAX_LEVELS
from scheduler.refusal import RefusalReason, RequestRefused
from scheduler.snapshot import MAX_SEQUENCES, take_snapshot
from scheduler.types import FinishReason, SequenceState
from tests.scheduler.driver import TOKEN, Driver, request

COSTS = CostModel(step_s=0.0, slice_s=0.0, token_s=0.1, pair_s=0.0)  # 0.1 s per token


def _lengths(output: int) -> Lengths:
    """Every output has been this long."""
    lengths = Lengths()
    for _ in range(500):
        lengths.observe("", 16, output, True)
    return lengths


def _driver(output: int = 20, **config: object) -> Driver:
    return Driver(costs=COSTS, lengths=_lengths(output), **{"num_pages": 64, "max_num_seqs": 1, **config})


def test_a_deadline_before_the_prompt_is_computed_is_refused_at_once_with_both_numbers() -> None:
    driver = _driver()
    with pytest.raises(RequestRefused) as refused:
        driver.add(request("a", 30, deadline_s=2.9, max_tokens=20))
    error = refused.value
    assert error.reason is RefusalReason.DEADLINE
    assert error.wanted > 3.0 > error.limit == pytest.approx(2.9)
    assert "2.90 s" in str(error)
    assert not driver.scheduler.has_work


def test_a_deadline_that_can_be_met_is_accepted() -> None:
    driver = _driver()
    driver.add(request("a", 30, deadline_s=3.6, max_tokens=20))  # 3 s of prompt, a tenth of the output
    assert driver.scheduler.stats().num_waiting == 1


def test_the_work_of_those_ahead_counts() -> None:
    driver = _driver()
    driver.add(request("alone", 16, deadline_s=4.0, max_tokens=20))
    driver.scheduler.abort("alone")
    driver.add(*[request(f"r{k}", 16, max_tokens=20) for k in range(3)])
    ahead_s = driver.scheduler.stats().backlog_s
    assert ahead_s == pytest.approx(3 * 3.6, rel=0.1)
    with pytest.raises(RequestRefused) as refused:
        driver.add(request("b", 16, deadline_s=4.0, max_tokens=20))
    assert refused.value.retry_after_s == pytest.approx(ahead_s)


def test_the_estimate_falls_as_work_is_done_and_is_nothing_at_the_end() -> None:
    driver = _driver()
    driver.add(request("a", 16, max_tokens=20), request("b", 16, max_tokens=20))
    before = driver.scheduler.stats().backlog_s
    for _ in range(4):
        driver.step()
    assert driver.scheduler.stats().backlog_s == pytest.approx(before - 1.9)  # 16 + 3 tokens
    driver.finish()
    assert driver.scheduler.stats().backlog_s == 0.0


def test_what_was_accepted_before_a_crash_is_not_refused_for_its_deadline() -> None:
    driver = _driver()
    driver.add(request("a", 30, deadline_s=0.5, max_tokens=20, readmitted=True))
    driver.clock.advance(1.0)
    assert [news.finish for news in driver.scheduler.expire()] == [FinishReason.DEADLINE]


def test_computed_prefixes_shorten_the_estimate() -> None:
    driver = _driver()
    prompt = tuple(range(30))
    driver.add(request("a", prompt, max_tokens=1))
    driver.finish()
    driver.add(request("b", prompt, deadline_s=1.0, max_tokens=20))  # 28 of 30 tokens are there
    assert driver.scheduler.stats().backlog_s == pytest.approx(0.2 + 2.0, rel=0.1)  # not 5 s
    with pytest.raises(RequestRefused):
        driver.add(request("c", 30, deadline_s=1.0, max_tokens=20))


def test_choices_that_are_held_back_are_waited_for_too() -> None:
    """The prompt's full pages are computed once: 12 of its 16 tokens."""
    driver = _driver()
    driver.add(request("alone", 16, deadline_s=9.0, max_tokens=20))
    driver.scheduler.abort("alone")
    driver.add(request("a", 16, num_choices=4, max_tokens=20))
    ahead_s = driver.scheduler.stats().backlog_s
    assert ahead_s == pytest.approx(1.6 + 3 * 0.4 + 4 * 2.0, rel=0.1)
    with pytest.raises(RequestRefused):
        driver.add(request("b", 16, deadline_s=5.0, max_tokens=20))
    driver.step()  # the prompt; the others queue now
    assert driver.scheduler.stats().backlog_s == pytest.approx(ahead_s - 1.6)
    driver.scheduler.abort("a", 0)
    assert driver.scheduler.stats().backlog_s == pytest.approx(3 * 2.4, rel=0.1)
    driver.finish()
    assert driver.scheduler.stats().backlog_s == 0.0


def test_the_next_to_lead_brings_the_prompt_with_it() -> None:
    driver = _driver()
    driver.add(request("a", 16, num_choices=2, max_tokens=20))
    driver.scheduler.abort("a", 0)
    assert driver.scheduler.stats().backlog_s == pytest.approx(1.6 + 2.0, rel=0.1)
    driver.scheduler.abort("a", 1)
    assert driver.scheduler.stats().backlog_s == 0.0


def test_a_full_queue_says_when_to_come_back() -> None:
    driver = _driver(max_queued_requests=2)
    driver.add(*[request(f"r{k}", 16, max_tokens=20) for k in range(3)])
    with pytest.raises(RequestRefused) as refused:
        driver.add(request("more"))
    assert refused.value.reason is RefusalReason.QUEUE_FULL
    assert refused.value.retry_after_s == pytest.approx(3.6, rel=0.1)  # one place: until one has ended


def test_a_deadline_keeps_the_tokens_so_far() -> None:
    driver = _driver()
    driver.add(request("a", 4, deadline_s=10.0, max_tokens=50))
    news = [one for _ in range(3) for one in driver.apply(driver.plan())]
    driver.clock.advance(10.0)
    (end,) = driver.scheduler.expire()
    assert [token for one in news for token in one.tokens] == [TOKEN] * 3
    assert (end.finish, end.tokens, end.error) == (FinishReason.DEADLINE, (), None)


# Levels


def test_the_counters_of_levels_add_up() -> None:
    driver = Driver(policy="mlfq-static", costs=COSTS, static_quantum_s=0.8, num_pages=64, max_num_seqs=2)
    driver.add(*[request(f"r{k}", 4 + 8 * (k % 3), max_tokens=12, arrival_s=k / 10) for k in range(9)])
    running = waiting = 0
    while driver.scheduler.has_work:
        driver.step()
        stats = driver.scheduler.stats()
        assert sum(level.num_running for level in stats.levels) == stats.num_running
        assert sum(level.num_waiting for level in stats.levels) == stats.num_waiting - stats.num_parked
        running, waiting = max(running, stats.num_running), max(waiting, stats.num_waiting)
        driver.clock.advance(0.1)
    assert (running, waiting) == (2, 7)
    levels = driver.scheduler.stats().levels
    assert sum(level.num_entered for level in levels) == 9
    assert sum(level.num_seated for level in levels) == 9 + driver.scheduler.stats().num_preemptions
    assert sum(level.num_preempted for level in levels) == driver.scheduler.stats().num_preemptions
    assert levels[0].num_demoted > 0
    assert sum(level.waited_s for level in levels) > 0.0


def test_of_too_many_levels_each_counts_with_the_nearest_known_one_and_none_is_lost() -> None:
    driver = Driver(policy="priority", max_num_seqs=1, num_pages=64)
    driver.add(*[request(f"r{k}", priority=k) for k in range(2 * MAX_LEVELS)])
    levels = driver.scheduler.stats().levels
    assert [level.level for level in levels] == list(range(MAX_LEVELS))
    assert (levels[0].num_waiting, levels[-1].num_waiting) == (1, MAX_LEVELS + 1)
    assert levels[-1].num_entered == MAX_LEVELS + 1
    driver.add(request("urgent", priority=-1))
    driver.step()
    levels = driver.scheduler.stats().levels
    assert [level.level for level in levels] == list(range(MAX_LEVELS))  # or counters would fall
    assert (levels[0].num_entered, levels[0].num_running, levels[0].num_seated) == (2, 1, 1)


# What people may look at


def test_a_snapshot_shows_who_is_where() -> None:
    driver = Driver(policy="mlfq-static", max_num_seqs=1, tenant_weights=("t=2",))
    driver.add(request("runs", 8, max_tokens=9, tenant="t"), request("waits", 8, tenant="u", arrival_s=1.0))
    driver.clock.advance(3.0)
    driver.step()
    snapshot = take_snapshot(driver.scheduler, max_sequences=10)
    runs, waits = snapshot.sequences
    assert (runs.request_id, runs.state, runs.waiting_s, runs.num_pages) == (
        "runs",
        SequenceState.RUNNING,
        0.0,
        2,
    )
    assert (waits.request_id, waits.state, waits.waiting_s, waits.age_s) == (
        "waits",
        SequenceState.WAITING,
        3.0,
        2.0,
    )
    assert runs.head_start_s is not None
    assert [(tenant.tenant, tenant.weight, tenant.num_running) for tenant in snapshot.tenants] == [
        ("t", 2.0, 1),
        ("u", 1.0, 0),
    ]
    assert (snapshot.policy, snapshot.num_steps) == ("mlfq-static", 1)


def test_a_snapshot_is_cut_but_its_counts_are_whole() -> None:
    driver = Driver(policy="priority", max_num_seqs=1)
    driver.add(*[request(f"r{k}", tenant=str(k)) for k in range(9)])
    snapshot = take_snapshot(driver.scheduler, max_sequences=3)
    assert (len(snapshot.sequences), len(snapshot.tenants)) == (3, 3)
    assert snapshot.stats.num_waiting == 9
    assert all(view.head_start_s is None for view in snapshot.sequences)  # the order knows none


def test_a_snapshot_is_bounded_and_shows_first_who_runs() -> None:
    """Each description takes microseconds in which everybody waits."""
    driver = Driver(policy="priority", max_num_seqs=2, max_queued_requests=2000)
    driver.add(*[request(f"r{k}", 4, max_tokens=1) for k in range(MAX_SEQUENCES + 50)])
    driver.add(*[request(f"first{k}", 4, max_tokens=9, priority=-1) for k in range(2)])
    driver.step()
    snapshot = take_snapshot(driver.scheduler, max_sequences=10_000)
    assert len(snapshot.sequences) == MAX_SEQUENCES
    assert {view.request_id for view in snapshot.sequences[:2]} == {"first0", "first1"}
    assert SequenceState.RUNNING not in {view.state for view in snapshot.sequences[2:]}
