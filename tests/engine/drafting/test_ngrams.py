"""Guesses from repetition against an obvious search, and what they may never do."""

from __future__ import annotations

import random

from engine.drafting.ngrams import LONGEST_MATCH, PLACES_PER_KEY, NgramIndex


def indexed(tokens: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(tokens)
    return index


def longest_ending(tokens: list[int]) -> int:
    """The longest ending of the list that occurs earlier in it."""
    for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
        ending = tokens[-length:]
        if any(tokens[at : at + length] == ending for at in range(len(tokens) - length)):
            return length
    return 0


def test_copying_goes_on_where_the_copied_text_went_on():
    text = [5, 1, 7, 9, 2, 4, 8, 6, 3]
    index = indexed([*text, 99, 5, 1, 7])
    assert index.guess(index.tokens, 4).tokens == (9, 2, 4, 8)
    assert index.guess(index.tokens, 100).tokens == (9, 2, 4, 8, 6, 3, 99, 5, 1, 7)


def test_the_longest_common_ending_wins_over_the_latest():
    index = indexed([1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4])
    assert index.guess(index.tokens, 1).tokens == (50,)


def test_of_equal_endings_the_majority_wins_and_of_a_tie_the_latest():
    assert indexed([7, 1, 0, 7, 2, 0, 7, 2, 9, 7]).guess([7], 1).tokens == (2,)
    assert indexed([7, 1, 0, 7, 2, 9, 7]).guess([7], 1).tokens == (2,)


def test_nothing_known_is_no_guess():
    assert indexed([1, 2, 3]).guess([4], 5).tokens == ()
    assert indexed([]).guess([4], 5).tokens == ()
    assert indexed([1, 2, 3]).guess([3], 5).tokens == (), "its own end is no place where it occurred before"


def test_an_index_that_grows_equals_one_made_at_once_and_finds_the_longest_ending():
    rng = random.Random(1)
    for _ in range(200):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(1, 40))]
        grown = NgramIndex()
        while len(grown.tokens) < len(tokens):
            grown.extend(tokens[len(grown.tokens) :][: rng.randrange(1, 5)])
        at_once = indexed(tokens)
        assert grown.guess(tokens, 6) == at_once.guess(tokens, 6)
        if len(tokens) <= PLACES_PER_KEY:  # no place is forgotten
            guess = at_once.guess(tokens, 1)
            assert bool(guess.tokens) == (longest_ending(tokens) > 0)
            if guess.tokens:
                length = longest_ending(tokens)
                following = {
                    tokens[at + length]
                    for at in range(len(tokens) - length)
                    if tokens[at : at + length] == tokens[-length:]
                }
                assert guess.tokens[0] in following
