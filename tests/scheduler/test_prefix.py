from __future__ import annotations

from scheduler.prefix import page_key, root_key
from scheduler.types import Visibility
from tests.scheduler.driver import Driver, request

PROMPT = tuple(range(12))


def test_a_key_covers_everything_that_the_kv_depends_on() -> None:
    root = root_key(Visibility.CAUSAL, "")
    roots = {
        root,
        root_key(Visibility.ALL, ""),
        root_key(Visibility.CAUSAL, "salt"),
        root_key(Visibility.CAUSAL, "", private_to=0),
        root_key(Visibility.CAUSAL, "", private_to=1),
    }
    assert len(roots) == 5
    keys = {page_key(root, [1, 2]), page_key(root, [2, 1]), page_key(page_key(root, [1, 2]), [1, 2])}
    assert len(keys | roots) == 8
    assert page_key(root, [1, 2]) == page_key(root_key(Visibility.CAUSAL, ""), (1, 2))


def _num_cached(driver: Driver, name: str, prompt: tuple[int, ...], salt: str = "") -> int:
    driver.add(request(name, prompt, max_tokens=1, cache_salt=salt))
    return driver.finish()[-1].num_cached


def test_a_prompt_finds_the_full_pages_of_an_equal_beginning() -> None:
    driver = Driver()
    assert _num_cached(driver, "a", PROMPT) == 0
    assert _num_cached(driver, "b", (*PROMPT[:9], 99, 99, 99)) == 8


def test_the_last_prompt_token_is_always_computed() -> None:
    driver = Driver()
    _num_cached(driver, "a", PROMPT)
    assert _num_cached(driver, "b", PROMPT) == 8


def test_other_salts_find_nothing() -> None:
    driver = Driver()
    _num_cached(driver, "a", PROMPT)
    assert _num_cached(driver, "b", PROMPT, salt="other") == 0


def test_output_is_found_as_part_of_a_longer_prompt() -> None:
    driver = Driver()
    driver.add(request("a", PROMPT, max_tokens=6))
    output = [token for news in driver.finish() for token in news.tokens]
    # The last output token was never computed: 17 of 18 slots hold KV, so 4 pages are full.
    assert _num_cached(driver, "b", (*PROMPT, *output, 1)) == 16


def test_without_a_prefix_cache_only_choices_of_one_request_share() -> None:
    driver = Driver(prefix_cache=False)
    assert _num_cached(driver, "a", PROMPT) == 0
    assert _num_cached(driver, "a", PROMPT) == 0
    driver.add(request("b", PROMPT, max_tokens=1, num_choices=2))
    assert [news.num_cached for news in driver.finish()] == [0, 8]


def test_two_who_compute_the_same_at_once_both_end_well() -> None:
    driver = Driver()
    driver.add(request("a", PROMPT, max_tokens=3), request("b", PROMPT, max_tokens=3))
    first = driver.step()
    assert len(first) == 2
    driver.finish()
    stats = driver.scheduler.stats()
    assert stats.num_pages_held == 0
    assert stats.num_pages_cached == 3


def test_hits_are_counted_once_per_request() -> None:
    driver = Driver()
    _num_cached(driver, "a", PROMPT)
    _num_cached(driver, "b", PROMPT)
    stats = driver.scheduler.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (24, 8)
