"""Stop strings: the result depends on the text alone, never on how it is cut; nothing is held for long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.stops import StopMatcher

words = st.text("ab", min_size=1, max_size=5)


def run(
    text: str, stops: tuple[str, ...], cuts: list[int], include_stop: bool = False
) -> tuple[str, str | None]:
    matcher, out, at, matched = StopMatcher(stops, include_stop), "", 0, None
    for size in [*cuts, len(text)]:
        shown, matched = matcher.push(text[at : at + size])
        out += shown
        at += size
        assert (out + matcher._held == text[:at]) or matched
    return out + matcher.flush(), matched


def obvious(text: str, stops: tuple[str, ...], include_stop: bool = False) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            stop = max(matching, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(words, max_size=4).map(tuple),
    cuts=st.lists(st.integers(0, 4), max_size=20),
    include_stop=st.booleans(),
)
def test_any_cut_gives_what_the_definition_gives(
    text: str, stops: tuple[str, ...], cuts: list[int], include_stop: bool
) -> None:
    assert run(text, stops, cuts, include_stop) == obvious(text, stops, include_stop)


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc", max_size=20), stops=st.lists(words, min_size=1, max_size=3).map(tuple))
def test_only_what_may_still_become_a_stop_is_held_back(text: str, stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    shown, matched = matcher.push(text)
    if matched is None:
        held = text[len(shown) :]
        may_become = [text[at:] for at in range(len(text)) if any(s.startswith(text[at:]) for s in stops)]
        assert held == (may_become[0] if may_become else "")


def test_examples() -> None:
    assert run("one\n\nUser: two", ("\nUser:",), [4, 2]) == ("one\n", "\nUser:")
    assert run("abcd", ("abcd", "bc"), [1]) == ("a", "bc")  # complete first
    assert run("xabc", ("c", "abc"), []) == ("x", "abc")  # complete at once: the longest
    assert run("xabc", ("abc",), [2], include_stop=True) == ("xabc", "abc")
    assert run("🙂stop", ("🙂s",), [1]) == ("", "🙂s")


def test_after_a_match_nothing_comes() -> None:
    matcher = StopMatcher(("b",), include_stop=False)
    assert matcher.push("abc") == ("a", "b")
    assert matcher.push("abc") == ("", "b")
    assert matcher.flush() == ""


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(("a", ""), include_stop=False)


def test_time_is_linear_on_what_is_worst_for_a_search() -> None:
    matcher = StopMatcher(("a" * 255 + "b", "a" * 128 + "c"), include_stop=False)
    start = time.perf_counter()
    for _ in range(50_000):
        assert matcher.push("aaaa")[1] is None
    assert time.perf_counter() - start < 5.0
