"""What comes in and how it ends: add, abort, expire, choices, continued streams."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.invariants import check_empty
from scheduler.length_histogram import EDGES
from scheduler.lengths import ALL
from scheduler.plan import Advance
from scheduler.scheduler import RefusalReason, RequestRefused
from scheduler.types import FinishReason
from tests.scheduler.driver import TOKEN, Driver, request


@pytest.mark.parametrize(
    ("fields", "reason", "wanted", "limit"),
    [
        ({"prompt": ()}, RefusalReason.EMPTY, 0, 0),
        ({"num_choices": 0}, RefusalReason.EMPTY, 0, 0),
        ({"prompt": 40}, RefusalReason.CONTEXT, 41, 40),
        ({"prompt": 20, "max_tokens": 13}, RefusalReason.MEMORY, 33, 32),
        ({"prompt": 4, "max_tokens": 10**9}, RefusalReason.MEMORY, 40, 32),
    ],
)
def test_what_can_never_fit_is_refused_with_both_numbers(
    fields: dict[str, Any], reason: RefusalReason, wanted: int, limit: int
) -> None:
    driver = Driver(max_model_len=40, num_pages=8)
    with pytest.raises(RequestRefused) as refused:
        driver.add(request("a", **fields))
    assert (refused.value.reason, refused.value.wanted, refused.value.limit) == (reason, wanted, limit)
    if limit:
        assert str(limit) in str(refused.value)
    check_empty(driver.scheduler)


def test_what_just_fits_is_served() -> None:
    driver = Driver(max_model_len=40, num_pages=8)
    driver.add(request("a", 20, max_tokens=12))
    assert driver.finish()[-1].finish is FinishReason.LENGTH


def test_an_id_can_be_used_again_only_after_its_end() -> None:
    driver = Driver()
    driver.add(request("a", max_tokens=1))
    with pytest.raises(RequestRefused, match="'a'"):
        driver.add(request("a"))
    driver.finish()
    driver.add(request("a", max_tokens=1))
    assert len(driver.finish()) == 1


def test_the_queue_is_bounded_beside_the_free_places() -> None:
    driver = Driver(max_num_seqs=2, max_queued_requests=1)
    driver.add(request("a"), request("b"), request("c"))
    with pytest.raises(RequestRefused) as refused:
        driver.add(request("d"))
    assert refused.value.reason is RefusalReason.QUEUE_FULL
    driver.step()  # a and b run, c waits
    with pytest.raises(RequestRefused):
        driver.add(request("d"))
    driver.scheduler.abort("a")
    driver.step()
    driver.add(request("d"))


def test_what_an_earlier_engine_process_accepted_is_accepted_whatever_the_load() -> None:
    driver = Driver(max_num_seqs=1, max_queued_requests=1)
    driver.add(request("a"), request("b"))
    with pytest.raises(RequestRefused):
        driver.add(request("c"))
    driver.add(request("c", delivered=((TOKEN,),), readmitted=True), request("d", readmitted=True))
    assert driver.scheduler.stats().num_waiting == 4
    assert sum(news.finish is FinishReason.LENGTH for news in driver.finish()) == 4


def test_an_abort_ends_every_live_choice_once() -> None:
    driver = Driver()
    driver.add(request("a", num_choices=3))
    driver.step()
    progress = driver.scheduler.abort("a")
    assert [(news.index, news.finish) for news in progress] == [(k, FinishReason.ABORT) for k in range(3)]
    assert driver.scheduler.abort("a") == ()
    check_empty(driver.scheduler)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_abort_of_one_choice_spares_the_others(steps: int) -> None:
    driver = Driver()
    driver.add(request("a", num_choices=3, max_tokens=4))
    for _ in range(steps):
        driver.step()
    assert [news.index for news in driver.scheduler.abort("a", 0)] == [0]
    assert driver.scheduler.abort("a", 7) == ()
    ends = [news.index for news in driver.finish() if news.finish is FinishReason.LENGTH]
    assert sorted(ends) == [1, 2]
    check_empty(driver.scheduler)


def test_an_abort_while_the_step_computes_drops_its_advance() -> None:
    driver = Driver()
    driver.add(request("a"), request("b"))
    plan = driver.plan()
    advances = [driver.answer(piece) for piece in plan.slices]
    driver.scheduler.abort("a")
    assert [news.request_id for news in driver.apply(plan, *advances)] == ["b"]


@pytest.mark.parametrize("index", [0, None])
@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_lengths_are_learned_from_a_text_that_ended_and_bounded_by_one_that_was_cut(
    policy: str, index: int | None
) -> None:
    driver = Driver(policy=policy, num_pages=64)
    driver.add(request("ended", max_tokens=9), request("cut", max_tokens=9))
    for _ in range(3):
        driver.step()
    (news,) = driver.scheduler.abort("ended", index, natural=True)
    driver.scheduler.abort("cut", index)
    assert news.finish is FinishReason.ABORT
    ended, cut = driver.scheduler.lengths._shared[ALL].counts()
    assert [k for k, count in enumerate(ended) if count] == [EDGES.index(3)]
    assert [k for k, count in enumerate(cut) if count] == [EDGES.index(4)]


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
@pytest.mark.parametrize("index", [0, 1])
def test_nothing_is_learned_again_from_a_choice_that_ended_before_the_engine_did(
    policy: str, index: int
) -> None:
    driver = Driver(policy=policy, num_pages=64)
    delivered = ((TOKEN, TOKEN), (TOKEN, TOKEN))
    driver.add(request("a", num_choices=2, delivered=delivered, readmitted=True, max_tokens=9))
    driver.scheduler.abort("a", index, natural=True)
    assert driver.scheduler.lengths._shared[ALL].num_seen == 0


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_nothing_is_learned_from_what_an_earlier_engine_process_ended(policy: str) -> None:
    driver = Driver(policy=policy)
    delivered = ((TOKEN,), (TOKEN,), ())
    driver.add(request("a", num_choices=3, delivered=delivered, readmitted=True, stop_token_ids=(TOKEN,)))
    assert sorted(news.index for news in driver.scheduler.expire()) == [0, 1]
    assert driver.scheduler.lengths._shared[ALL].num_seen == 0


def test_nothing_happens_to_what_nobody_knows() -> None:
    assert Driver().scheduler.abort("nobody") == ()


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_a_deadline_ends_the_waiting_and_the_running(max_num_seqs: int) -> None:
    driver = Driver(max_num_seqs=max_num_seqs)
    driver.add(request("a", deadline_s=1.0, num_choices=2), request("b", deadline_s=2.0), request("c"))
    driver.step()
    driver.clock.advance(1.0)
    assert [(news.request_id, news.finish) for news in driver.scheduler.expire()] == [
        ("a", FinishReason.DEADLINE),
        ("a", FinishReason.DEADLINE),
    ]
    driver.clock.advance(1.0)
    assert [news.request_id for news in driver.scheduler.expire()] == ["b"]
    driver.finish()
    assert driver.scheduler.expire() == ()
    check_empty(driver.scheduler)


def test_choices_wait_for_the_prompt_and_find_its_pages() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.add(request("a", 14, num_choices=3, max_tokens=2))
    assert [driver.counts() for _ in range(3)] == [
        {"a.0": 8},
        {"a.0": 6},
        {"a.0": 1, "a.1": 2, "a.2": 2},
    ]


def test_choices_come_before_requests_that_arrived_after_theirs() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add(request("a", num_choices=2, max_tokens=1), request("b", arrival_s=1.0, max_tokens=1))
    assert [list(driver.step()) for _ in range(3)] == [["a.0"], ["a.1"], ["b.0"]]


def test_a_failing_first_choice_lets_the_others_go() -> None:
    driver = Driver()
    driver.add(request("a", num_choices=2, max_tokens=1))
    plan = driver.plan()
    failed = driver.apply(plan, Advance(plan.slices[0].seq_id, (), 0, error="no"))
    assert [(news.finish, news.error) for news in failed] == [(FinishReason.ERROR, "no")]
    assert [news.index for news in driver.finish()] == [1]


def test_a_continued_stream_goes_on_where_it_was() -> None:
    driver = Driver()
    driver.add(request("a", 4, max_tokens=3, num_choices=2, delivered=((1, 2),)))
    first = driver.step()["a.0"]
    assert first.tokens[-2:] == (1, 2)
    assert first.num_logits == 1
    ends = {news.index: news for news in driver.finish()}
    assert set(ends) == {1}  # choice 0 needed one token only, and had it in the first step


@pytest.mark.parametrize(
    ("delivered", "finish", "stop"),
    [((1, 2, 3), FinishReason.LENGTH, None), ((1, 9), FinishReason.STOP, 9)],
)
def test_a_stream_that_was_delivered_to_its_end_ends_at_once(
    delivered: tuple[int, ...], finish: FinishReason, stop: int | None
) -> None:
    driver = Driver()
    driver.add(request("a", max_tokens=3, stop_token_ids=(9,), delivered=(delivered,)))
    assert driver.scheduler.has_work
    (news,) = driver.scheduler.expire()
    assert (news.finish, news.stop_token, news.tokens) == (finish, stop, ())
    check_empty(driver.scheduler)


def test_no_output_wanted_means_no_step() -> None:
    driver = Driver()
    driver.add(request("a", max_tokens=0))
    assert driver.plan().slices == ()
    assert [news.finish for news in driver.finish()] == [FinishReason.LENGTH]


def test_stats_count_what_is_there() -> None:
    driver = Driver(policy="mlfq", max_num_seqs=1, num_pages=16)
    driver.add(request("a", 8, max_tokens=4), request("b", 30, num_choices=2, max_tokens=4))
    driver.step()
    stats = driver.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 2)
    assert (stats.num_pages, stats.num_pages_held, stats.num_pages_cached) == (16, 2, 0)
    assert sum(level.num_running for level in stats.levels) == 1
    # the second choice is held back: it is in no level yet
    assert sum(level.num_waiting for level in stats.levels) == 1


def test_when_the_first_choice_ends_early_the_next_one_computes_the_prompt_for_the_rest() -> None:
    """After a crash the first choice may have been delivered whole: the others must not all compute alone."""
    driver = Driver()
    driver.add(request("a", num_choices=4, max_tokens=4))
    driver.scheduler.abort("a", 0)
    assert len(driver.plan().slices) == 1
