"""Pages by groups of layers: what is let go of behind a window, what is found again, and what fits."""

from __future__ import annotations

import pytest

from scheduler.costs import CostModel
from scheduler.plan import Advance
from scheduler.refusal import RequestRefused
from scheduler.spans import NO_PAGE, Spans
from tests.scheduler.driver import Driver, line, request

PAGE = 4


def tables(driver: Driver, seq_id: int = 0) -> list[str]:
    """By group: "x" a page, "." a hole."""
    num_groups, pages = len(driver.scheduler.spans), driver.scheduler.sequence(seq_id).pages
    return [
        "".join("." if page == NO_PAGE else "x" for page in pages[group::num_groups])
        for group in range(num_groups)
    ]


@pytest.mark.parametrize("span", range(1, 14))
def test_the_most_pages_are_never_exceeded_and_reached(span: int) -> None:
    for chunk in (1, 2, 5, 8):
        bound = Spans((span,), PAGE).most_pages(60, chunk)
        held = []
        for start in range(60):
            first_seen = max(0, start // PAGE * PAGE - span + 1) // PAGE
            held.append(-(-min(60, start + chunk) // PAGE) - first_seen)
        assert max(held) == bound


@pytest.mark.parametrize("spans", [(0,), (5,), (0, 5), (0, 0, 9, 3)])
def test_the_longest_sequence_that_fits(spans: tuple[int, ...]) -> None:
    pages = Spans(spans, PAGE)
    for num_pages in range(60):
        longest = pages.longest(num_pages, 6, 50)
        assert not longest or pages.most_pages(longest, 6) <= num_pages
        assert longest == 50 or pages.most_pages(longest + 1, 6) > num_pages


def test_pages_behind_a_window_are_let_go_of() -> None:
    driver = Driver(spans=(0, 6, 11), num_pages=64, max_num_batched_tokens=8)
    driver.add(request("r", prompt=16, max_tokens=24))
    driver.step()
    driver.step()
    assert tables(driver) == ["xxxx", "..xx", ".xxx"]
    for _ in range(3):
        driver.step()
    assert tables(driver) == ["xxxxx", "..xxx", ".xxxx"]
    driver.step()
    assert tables(driver) == ["xxxxx", "...xx", "..xxx"]
    driver.finish()


def test_of_a_prompt_they_can_be_found_and_of_output_they_are_free() -> None:
    driver = Driver(spans=(5,), num_pages=16)
    driver.add(request("r", prompt=16, max_tokens=25))
    pool = driver.scheduler._pool
    driver.step()
    assert (len(pool.cached), pool.num_held) == (3, 1)
    for _ in range(24):
        driver.step()
    assert not driver.scheduler.has_work
    # What lies behind the window at the end was output and is free, but for the prompt.
    assert len(pool.cached) == 4 + 1


def test_a_bounded_number_of_pages_serves_any_length() -> None:
    driver = Driver(max_model_len=400, spans=(8,), num_pages=5, max_num_batched_tokens=8)
    driver.add(request("r", prompt=20, max_tokens=380))
    news = driver.finish(max_steps=400)
    assert news[-1].finish == "length"
    assert driver.scheduler.stats().num_preemptions == 0


def test_what_does_not_fit_at_once_is_refused() -> None:
    driver = Driver(max_model_len=400, spans=(0, 8), num_pages=20, max_num_batched_tokens=8)
    with pytest.raises(RequestRefused, match="the KV pages hold 60") as refused:
        driver.add(request("r", prompt=20, max_tokens=41))
    assert refused.value.reason == "memory"
    driver.add(request("fits", prompt=20, max_tokens=40))
    driver.finish()


def test_a_prefix_is_found_where_the_window_before_it_is_whole() -> None:
    driver = Driver(max_model_len=100, spans=(0, 6), num_pages=64, max_num_batched_tokens=64)
    prompt = tuple(range(40))
    driver.add(request("first", prompt, max_tokens=1))
    driver.finish()
    pool, keys = driver.scheduler._pool, {}
    driver.add(request("second", prompt, max_tokens=1))
    plan = driver.plan()
    piece = plan.slices[0]
    assert piece.start == 36
    assert piece.new_pages[0::2].count(NO_PAGE) == 0
    assert [page == NO_PAGE for page in piece.new_pages[1::2]] == [*[True] * 7, False, False, False]
    sequence = driver.scheduler.sequence(piece.seq_id)
    keys = {number: driver.scheduler._tables.key(sequence, 2 * number + 1) for number in range(9)}
    driver.apply(plan)
    # Without page 7 of the sliding group nothing from there to page 8 can begin; what needs less can.
    pool.hold(pool.page_of[keys[7]])
    lost = pool.page_of[keys[7]]
    pool.forget(lost)
    pool.release([lost])
    driver.add(request("third", prompt, max_tokens=1))
    assert driver.step()["third.0"].start == 28
    driver.finish()


def test_choices_share_the_window_before_the_end_of_the_prompt() -> None:
    driver = Driver(spans=(0, 6), num_pages=64, max_num_seqs=4)
    driver.add(request("r", prompt=18, num_choices=3, max_tokens=6))
    driver.step()
    pieces = driver.step()
    assert [pieces[f"r.{index}"].start for index in range(3)] == [18, 16, 16]
    first, *others = [driver.scheduler.sequence(number).pages for number in range(3)]
    assert [pages[:8] for pages in others] == [first[:8]] * 2
    driver.finish()


def test_the_preempted_go_on_from_the_window_that_they_had() -> None:
    driver = Driver(spans=(0, 6), num_pages=32)
    driver.add(request("r", prompt=18, max_tokens=20))
    for _ in range(6):
        driver.step()
    driver.set_aside(0)
    plan = driver.plan()
    assert plan.slices[0].start == 20
    assert tables(driver) == ["xxxxxx", "...xxx"]
    driver.apply(plan)
    driver.finish()


def test_a_window_of_drafts_keeps_what_its_first_token_sees() -> None:
    driver = Driver(spans=(6,), num_pages=16)
    driver.add(request("r", prompt=18, max_tokens=12))
    for _ in range(4):
        driver.step(window=line(1, 2, 3, 4, 5))  # none is accepted
    assert driver.scheduler.sequence(0).num_computed == 21
    assert tables(driver) == ["...xxxx"]
    driver.finish()


def test_what_a_lower_tier_brings_is_the_window_alone() -> None:
    driver = Driver(
        costs=CostModel(token_s=1.0),
        spans=(0, 6),
        num_pages=96,
        host_pages=64,
        max_num_batched_tokens=64,
    )
    driver.add(request("r", prompt=34, max_tokens=4))
    driver.finish()
    driver.scheduler._tiers.put_aside(list(driver.scheduler._pool.cached), 0.0)
    for _ in range(3):
        driver.plan()
        driver.land()
    host = driver.scheduler._tiers.host
    assert len(host.page_of) == 2 * 9  # of the prompt and the output
    driver.forget_cached_content()
    driver.add(request("r", prompt=34, max_tokens=4))
    copies = driver.plan().copies
    assert len(copies) == 8 + 2  # all that see everything, and the window
    driver.land()
    assert driver.step()["r.0"].start == 32
    driver.finish()


@pytest.mark.parametrize("host_pages", [0, 64])
def test_what_lies_behind_the_window_of_one_that_went_wrong_is_offered_to_nobody(host_pages: int) -> None:
    driver = Driver(spans=(6,), num_pages=32, max_num_batched_tokens=8, host_pages=host_pages)
    prompt = tuple(range(40))
    driver.add(request("other", prompt, max_tokens=20))
    driver.step()
    driver.add(request("bad", (*prompt[:4], *prompt[::-1]), max_tokens=20))
    other, bad = driver.scheduler.sequence(0), driver.scheduler.sequence(1)
    while bad.num_output < 1:
        driver.land()
        driver.step()
    own = set(bad.page_keys) - set(other.page_keys)
    pool, tiers = driver.scheduler._pool, driver.scheduler._tiers
    tiers.put_aside(list(pool.cached), 0.0)
    for _ in range(5):
        driver.step()
        driver.land()
    assert sum(map(tiers.has, own)) == (9 if host_pages else 0)
    driver.apply(driver.plan(), Advance(1, (), 0, error="not finite"))
    assert not any(pool.find(key) is not None or tiers.has(key) for key in own)
    assert any(page in pool.key_of for page in other.pages), "nobody else is harmed"
    driver.finish()
