"""The shape of a tree follows from the chances of its places, and from what became of drafts before."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.drafting.candidate_tree import LEAST_CHANCE, CandidateTrees, Level, best_first
from engine.drafting.guess import ROOT
from engine.drafting.kinds import belief_of
from tests.engine.drafting.heads.targets import sequence

SURE, DOUBTFUL = Level((1, 2, 3), (0.9, 0.05, 0.03)), Level((4, 5, 6), (0.4, 0.35, 0.2))
GREEDY = {"temperature": 0.0}


def paths(guess):
    found = []
    for token, parent in zip(guess.tokens, guess.parents, strict=True):
        found.append((*(found[parent] if parent != ROOT else ()), token))
    return found


def test_where_one_candidate_leads_the_tree_is_a_line():
    guess = best_first([SURE, SURE, SURE], 3)
    assert guess.tokens == (1, 1, 1)
    assert guess.parents == (ROOT, 0, 1)


def test_where_none_leads_the_tree_is_wide():
    assert paths(best_first([DOUBTFUL, DOUBTFUL], 4)) == [(4,), (5,), (6,), (4, 4)]


def test_alternatives_have_drafts_behind_them_only_where_candidates_do_not_depend_on_the_path():
    assert (5, 1) in paths(best_first([DOUBTFUL, SURE], 12))
    line = paths(best_first([DOUBTFUL, SURE], 12, spreads=False))
    assert (5, 1) not in line
    assert (4, 1) in line


def test_what_cannot_stand_is_not_drafted():
    guess = best_first([Level((7, 0), (1.0, 0.0)), Level((0, 0), (0.0, 0.0))], 5)
    assert guess.tokens == (7,)
    assert best_first([], 5).tokens == ()
    assert best_first([SURE], 0).tokens == ()


def test_how_far_to_draft_is_learned_from_the_text_for_draws_and_the_greedy_apart():
    trees = CandidateTrees()
    faint = [Level((9, 8), (0.2, 0.1))] * 8
    drawn = sequence([0], temperature=1.0)
    first = trees.grow(drawn, faint, 8, spreads=False)
    assert (9,) * 3 not in paths(first)
    for _ in range(40):
        drawn.tokens += [9] * 9
        later = trees.grow(drawn, faint, 8, spreads=False)
    assert later.tokens == (9,) * 8, "such drafts stand, however faint"
    assert paths(trees.grow(sequence([0], 1, **GREEDY), faint, 8, spreads=False)) == paths(first)
    for _ in range(600):
        drawn.tokens += [8, 1]
        later = trees.grow(drawn, faint, 8, spreads=False)
    assert later.tokens[0] == 8, "now the others do"
    trees.release(0)
    trees.release(1)
    assert not trees._last


chances = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5).map(lambda found: sorted(found, reverse=True))
levels = st.lists(chances.map(lambda found: Level(tuple(range(len(found))), tuple(found))), max_size=5)


@settings(max_examples=200, deadline=None)
@given(levels, st.integers(0, 20))
def test_the_likeliest_paths_are_drafted_and_make_a_sound_tree(levels, limit):
    guess = best_first(levels, limit)
    found = paths(guess)
    everything = {(): 1.0}
    for depth, level in enumerate(levels):
        before = [(path, chance) for path, chance in everything.items() if len(path) == depth]
        for token, chance in zip(level.tokens, level.chances, strict=True):
            known = belief_of(chance) if chance else 0.0
            everything |= {(*path, token): product * known for path, product in before}
    del everything[()]
    likely = [chance for chance in everything.values() if chance >= LEAST_CHANCE]
    assert len(set(found)) == len(found)
    assert abs(len(found) - min(limit, len(likely))) <= sum(
        chance == pytest.approx(LEAST_CHANCE) for chance in everything.values()
    )
    assert all(parent < index for index, parent in enumerate(guess.parents))
    best = sorted(everything.values(), reverse=True)[: len(found)]
    assert sorted((everything[path] for path in found), reverse=True) == pytest.approx(best)
