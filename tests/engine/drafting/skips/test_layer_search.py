"""The search for layers to skip, on models of how often a set is right."""

from __future__ import annotations

import random

import pytest

from engine.drafting.skips.layer_search import LayerSearch


def searched(search: LayerSearch, rate, rounds: int, seed: int = 1) -> LayerSearch:
    rng = random.Random(seed)
    for _ in range(rounds):
        proposal = search.proposal()
        assert proposal != search.skipped
        counts = [sum(rng.random() < rate(one) for _ in range(32)) for one in (search.skipped, proposal)]
        search.note(32, *counts)
    return search


def test_layers_that_do_nothing_are_found_and_skipped():
    idle = {1, 4, 5, 6, 9}
    search = searched(LayerSearch(12), lambda skipped: 1.0 if skipped <= idle else 0.02, 400)
    assert search.skipped == idle


def test_layers_that_do_little_are_preferred():
    little = {2, 3, 6, 8, 9, 12}

    def rate(skipped: frozenset[int]) -> float:
        return 0.97 ** len(skipped & little) * 0.6 ** len(skipped - little)

    search = searched(LayerSearch(16), rate, 600)
    assert len(search.skipped & little) >= 4
    assert not search.skipped - little


def test_where_the_text_changes_the_set_follows():
    search = searched(LayerSearch(8), lambda skipped: 1.0 if skipped <= {1, 2, 3} else 0.1, 300)
    assert search.skipped == {1, 2, 3}
    searched(search, lambda skipped: 1.0 if skipped <= {4, 5, 6} else 0.1, 300)
    assert search.skipped == {4, 5, 6}


def test_the_worth_of_a_set_grows_with_its_rate_and_falls_with_its_cost():
    search = LayerSearch(10, head_layers=2.0)
    few, many = frozenset({3}), frozenset({3, 4, 5})
    assert search.share(few) == pytest.approx(11 / 12)
    assert search.worth(many, 0.9) > search.worth(many, 0.8) > search.worth(few, 0.8)
    assert search.worth(many, 9 / 12) < 1.0 < search.worth(many, 9.1 / 12)
    assert search.worth(few, 1.0) == pytest.approx(13 / (1 + 12 * 11 / 12))
    assert search.worth(frozenset(), 1.0) == 1.0


@pytest.mark.parametrize("num_layers", [1, 2])
def test_nothing_to_choose_is_nothing_to_try(num_layers):
    search = LayerSearch(num_layers)
    assert search.skipped == frozenset()
    assert search.proposal() is None
    search.note(32, 1, 1)


def test_three_layers_are_a_choice_of_one():
    search = searched(LayerSearch(3, skipped=()), lambda skipped: 1.0, 20)
    assert search.skipped == {1}


def test_it_begins_with_every_second_layer_of_the_middle():
    assert LayerSearch(9).skipped == {2, 4, 6}
    assert LayerSearch(9).kept(frozenset({2, 4, 6})) == (0, 1, 3, 5, 7, 8)
