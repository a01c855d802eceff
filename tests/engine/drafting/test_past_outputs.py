"""What the server said before: found again, never across salts, never beyond its bound."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from engine.drafting import light_drafters
from engine.drafting.guess import CATCHING_UP, NO_GUESS, Want
from engine.drafting.past_outputs import PastOutputs
from engine.drafting.prompt_lookup import MAX_INDEXED_AT_ONCE, PromptLookup
from scheduler.types import Request, Sequence

SHARE_BYTES = 2**23


def sequence(prompt: list[int], output: list[int], salt: str = "", number: int = 0) -> Sequence:
    request = Request(request_id=f"r{number}", prompt_ids=tuple(prompt), sampling=None, cache_salt=salt)  # type: ignore[arg-type]
    return Sequence(number, request, 0, [*prompt, *output])


def guessed(drafter: PastOutputs | PromptLookup, after: Sequence, limit: int) -> tuple[int, ...]:
    return drafter.guess([Want(after, limit)])[0].tokens


def test_an_answer_is_guessed_again_from_the_end_of_its_prompt_on():
    past = PastOutputs(2**18)
    past.release(sequence([1, 2, 3, 4, 5], [10, 11, 12, 13]))
    assert guessed(past, sequence([9, 9, 4, 5], []), 3) == (10, 11, 12)
    assert guessed(past, sequence([8], [10, 11]), 9) == (12, 13)


def test_a_guess_never_runs_into_another_answer():
    past = PastOutputs(2**18)
    past.release(sequence([1], [10, 11]))
    past.release(sequence([2], [20, 21]))
    assert guessed(past, sequence([3], [10]), 9) == (11,)


def test_nothing_is_found_under_another_salt():
    past = PastOutputs(2**18)
    past.release(sequence([1, 2], [10, 11, 12], salt="a"))
    assert guessed(past, sequence([1, 2], [], salt="b"), 3) == ()
    assert guessed(past, sequence([1, 2], []), 3) == ()
    assert guessed(past, sequence([1, 2], [], salt="a"), 3) == (10, 11, 12)


def test_memory_is_bounded_and_the_oldest_goes_first():
    past = PastOutputs(max_tokens=400)
    for number in range(100):
        past.release(sequence([0], [1000 + number * 20 + k for k in range(20)], salt=f"s{number % 3}"))
        past.guess([])
        assert past.num_tokens <= 400
        kept = sum(len(index.tokens) for parts in past._stores.values() for index in parts)
        assert kept == past.num_tokens
    assert guessed(past, sequence([0], [1000 + 99 * 20], salt="s0"), 1)
    assert not guessed(past, sequence([0], [1000], salt="s0"), 1)


def test_prompts_are_indexed_while_there_is_room_and_again_when_others_have_ended():
    lookup = PromptLookup(max_tokens=20)
    first, second = (sequence([1, 2, 3, 4] * 3, [], number=number) for number in range(2))
    assert guessed(lookup, first, 2) == (1, 2)
    assert guessed(lookup, second, 2) == ()
    lookup.release(second)
    lookup.release(first)
    assert lookup.num_tokens == 0
    assert guessed(lookup, second, 2) == (1, 2)


def test_of_endings_as_long_the_newest_store_has_it_though_older_places_disagree():
    past = PastOutputs(max_tokens=40)
    past.release(sequence([0], [7, 8, 1, 7, 8, 2, 7, 8, 3]))  # fills a part
    past.release(sequence([0], [7, 8, 6]))
    assert guessed(past, sequence([50], [7, 8]), 1) == (6,)


def test_long_outputs_are_read_in_parts_and_those_nobody_reads_are_bounded():
    past = PastOutputs(max_tokens=5000)
    for number in range(5):
        past.release(sequence([0], [2000 * number + k for k in range(2000)], number=number))
    assert past._num_unread == sum(len(tokens) for _, tokens in past._unread) <= 5000
    assert past.num_tokens == 0, "an end costs nothing"
    after = sequence([0], [2000 * 4 + 1998])
    assert [guessed(past, after, 9) for _ in range(3)] == [(), (2000 * 4 + 1999,), (2000 * 4 + 1999,)]
    assert past._num_unread == 0
    assert past.num_tokens == sum(len(index.tokens) for parts in past._stores.values() for index in parts)


def test_nobody_waits_for_the_long_prompt_of_another():
    lookup = PromptLookup(2**18)
    long = sequence(list(range(1000)) * 5, [], number=0)
    short = sequence([1, 2, 3, 1, 2], [], number=1)
    wants = [Want(long, 4), Want(short, 4)]
    for _ in range(2):
        first, second = lookup.guess(wants)
        assert first is CATCHING_UP
        assert second.tokens[:1] == (3,)
    assert lookup.guess(wants)[0].tokens == (0, 1, 2, 3)


def test_prompts_that_are_still_read_count_as_a_whole():
    lookup = PromptLookup(max_tokens=2 * MAX_INDEXED_AT_ONCE)
    many = [sequence(list(range(MAX_INDEXED_AT_ONCE)), [], number=number) for number in range(3)]
    for _ in range(4):
        guesses = lookup.guess([Want(one, 4) for one in many])
        assert guesses[2] is NO_GUESS
    assert sum(len(index.tokens) for index in lookup._indices.values()) == lookup.num_tokens
    for one in many:
        lookup.release(one)
    assert lookup.num_tokens == 0


@pytest.mark.parametrize("name", ["prompt_lookup", "past_outputs"])
@pytest.mark.parametrize("salts", [1, 10**9], ids=["one salt", "a salt each"])
def test_what_is_remembered_takes_no_more_bytes_than_are_set_aside(name: str, salts: int) -> None:
    """As Python counts them, of tokens that never repeat, which take most."""
    drafter = light_drafters(1000, 5 * SHARE_BYTES // 2)[name]
    assert isinstance(drafter, PastOutputs | PromptLookup)
    rng = random.Random(1)
    tracemalloc.start()
    try:
        for number in range(1000):
            tokens = [rng.randrange(300, 10**6) for _ in range(20)]
            ended = sequence(tokens[:10], tokens[10:], salt=f"{number % salts:032}", number=number)
            drafter.guess([Want(ended, 1)])
            if name == "past_outputs":
                drafter.release(ended)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert drafter.num_tokens > drafter.max_tokens // 2
    assert SHARE_BYTES / 4 < held < SHARE_BYTES
