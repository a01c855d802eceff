"""What a step has made: stop conditions, windows, what others may find, what is given back."""

from __future__ import annotations

import pytest

from scheduler.invariants import check_empty
from scheduler.plan import Advance
from scheduler.types import FinishReason
from tests.scheduler.driver import TOKEN, Driver, block, line, request


def _started(driver: Driver, window: object = None, **fields: object) -> None:
    driver.add(request("a", 4, **{"max_tokens": 20, **fields}))
    driver.step(window=window or line())  # type: ignore[arg-type]


def test_tokens_after_a_stop_are_dropped() -> None:
    driver = Driver()
    _started(driver, stop_token_ids=(9,))
    (news,) = driver.apply(driver.plan(), Advance(0, (1, 9, 2, 3), 1))
    assert (news.tokens, news.finish, news.stop_token) == ((1, 9), FinishReason.STOP, 9)
    check_empty(driver.scheduler)


@pytest.mark.parametrize(("min_tokens", "said"), [(0, (9,)), (2, (9,)), (3, (9, 9)), (4, (9, 9, 9))])
def test_a_stop_token_counts_only_after_min_tokens(min_tokens: int, said: tuple[int, ...]) -> None:
    driver = Driver()
    _started(driver, stop_token_ids=(9,), min_tokens=min_tokens)  # one output token so far
    (news,) = driver.apply(driver.plan(), Advance(0, (9, 9, 9), 1))
    assert (news.tokens, news.finish) == (said, FinishReason.STOP)


def test_a_stop_token_at_the_end_of_the_prompt_stops_nothing() -> None:
    driver = Driver()
    driver.add(request("a", (1, 2, 9), stop_token_ids=(9,), max_tokens=2))
    assert [news.tokens for news in driver.finish()] == [(TOKEN,), (TOKEN,)]


def test_max_tokens_and_the_context_end_a_sequence() -> None:
    driver = Driver(max_model_len=7)
    driver.add(request("a", 4, max_tokens=2), request("b", 4, max_tokens=20))
    ends = {news.request_id: news for news in driver.finish() if news.finish}
    assert [one.finish for one in ends.values()] == [FinishReason.LENGTH] * 2
    outputs = driver.scheduler.stats()
    assert outputs.num_running == 0


def test_more_tokens_than_the_limit_are_dropped() -> None:
    driver = Driver()
    _started(driver, max_tokens=3)
    (news,) = driver.apply(driver.plan(), Advance(0, (1, 2, 3), 1))
    assert (news.tokens, news.finish) == ((1, 2), FinishReason.LENGTH)


def test_accepted_window_tokens_are_computed_and_rejected_ones_are_not() -> None:
    driver = Driver()
    _started(driver, window=line(1, 2, 3))
    driver.apply(driver.plan(), Advance(0, (1, 2, 8), 3))
    sequence = driver.scheduler.sequence(0)
    assert sequence.tokens[4:] == [TOKEN, 1, 2, 8]
    assert sequence.num_computed == 7
    assert driver.step()["a.0"].tokens == (8,)


def test_a_step_may_commit_nothing() -> None:
    driver = Driver()
    _started(driver, window=block(0, 0))
    assert driver.apply(driver.plan(), Advance(0, (), 1, block(5, 0))) == ()
    piece = driver.step()["a.0"]
    assert (piece.start, piece.tokens) == (5, (5, 0))


def test_pages_of_rejected_tokens_are_given_back() -> None:
    driver = Driver()
    _started(driver, window=line(*range(9)))
    plan = driver.plan()
    assert driver.scheduler.stats().num_pages_held == 4
    driver.apply(plan, Advance(0, (8,), 1))
    assert driver.scheduler.stats().num_pages_held == 2
    # The engine's table is longer than ours now; the next page replaces an entry of it.
    for _ in range(2):
        assert driver.step()["a.0"].new_pages == ()
    assert driver.step()["a.0"].new_pages == ()
    assert driver.step()["a.0"].first_new_page == 2


def test_provisional_tokens_are_never_found() -> None:
    driver = Driver()
    prompt = (1, 2, 3, 4)
    driver.add(request("a", prompt, max_tokens=20))
    driver.step(window=line(5, 6, 7))
    driver.apply(driver.plan(), Advance(0, (8,), 1))
    driver.add(request("b", (*prompt, TOKEN, 5, 6, 7, 0), max_tokens=1))
    assert driver.step()["b.0"].start == 4


def test_accepted_tokens_are_found() -> None:
    driver = Driver()
    prompt = (1, 2, 3, 4)
    driver.add(request("a", prompt, max_tokens=20))
    driver.step(window=line(5, 6, 0))
    driver.apply(driver.plan(), Advance(0, (5, 6, 9), 3))
    driver.step()
    driver.add(request("b", (*prompt, TOKEN, 5, 6, 9, 0), max_tokens=1))
    assert driver.step()["b.0"].start == 8


def test_kv_that_saw_later_tokens_is_not_found_nor_anything_behind_it() -> None:
    driver = Driver()
    prompt = (1, 2, 3, 4)
    driver.add(request("a", prompt, max_tokens=30))
    driver.step(window=block(5, 6, 9))
    driver.apply(driver.plan(), Advance(0, (5, 6, 9), 4, line(10)))
    driver.apply(driver.plan(), Advance(0, (10, 11, 12, 13, 14), 1))
    driver.step()
    assert driver.scheduler.sequence(0).num_computed > 12
    driver.add(request("b", (*prompt, TOKEN, 5, 6, 9, 10, 11, 12, 13, 0), max_tokens=1))
    assert driver.step()["b.0"].start == 4


def test_an_error_ends_one_sequence_and_publishes_nothing() -> None:
    driver = Driver()
    prompt = tuple(range(9))
    driver.add(request("a", prompt), request("b", 4))
    plan = driver.plan()
    news = driver.apply(plan, Advance(0, (), 9, error="out of range"), driver.answer(plan.slices[1]))
    assert [(one.request_id, one.finish, one.error) for one in news] == [
        ("a", FinishReason.ERROR, "out of range"),
        ("b", None, None),
    ]
    driver.add(request("c", prompt, max_tokens=1))
    assert driver.step()["c.0"].start == 0


def test_a_window_that_the_pool_can_never_hold_ends_its_sequence() -> None:
    driver = Driver(num_pages=3)
    _started(driver, max_tokens=8)
    (news,) = driver.apply(driver.plan(), Advance(0, (1,), 1, block(*range(9))))
    assert (news.tokens, news.finish) == ((1,), FinishReason.ERROR)
    assert "9 tokens" in str(news.error)
    assert "12" in str(news.error)
    check_empty(driver.scheduler)


def test_a_window_longer_than_a_step_is_a_bug() -> None:
    driver = Driver(max_num_batched_tokens=4)
    driver.add(request("a", 4))
    plan = driver.plan()
    with pytest.raises(AssertionError, match="window"):
        driver.scheduler.apply(plan, [Advance(0, (1,), 4, line(1, 2, 3, 4))])


def test_committing_nothing_without_a_window_is_a_bug() -> None:
    driver = Driver()
    driver.add(request("a", 4))
    plan = driver.plan()
    with pytest.raises(AssertionError, match="nothing to compute"):
        driver.scheduler.apply(plan, [Advance(0, (), 4)])


def test_a_plan_must_be_applied_before_the_next() -> None:
    driver = Driver()
    driver.add(request("a", 4))
    driver.plan()
    with pytest.raises(AssertionError, match="not applied"):
        driver.plan()


def test_the_first_news_say_when_it_was_scheduled_and_what_was_cached() -> None:
    driver = Driver()
    driver.add(request("a", tuple(range(9)), max_tokens=1))
    driver.finish()
    driver.clock.advance(2.5)
    driver.add(request("b", tuple(range(9)), max_tokens=1))
    (news,) = driver.finish()
    assert (news.first_scheduled_s, news.num_cached) == (2.5, 8)
