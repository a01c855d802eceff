"""Guesses of several drafters become one tree, and what it came to is told to each of them."""

from __future__ import annotations

import random

import pytest

from engine.drafting.acceptance import SUREST
from engine.drafting.draft_tree import DraftTree, Proposal
from engine.drafting.guess import ROOT, Guess, line
from scheduler.types import Visibility

ONE = line([5, 6, 7], [0, 1, 2], 0.5)
OTHER = Guess((5, 9, 6), (ROOT, ROOT, 0), (3, 4, 5), (0.4, 0.2, 0.9))


def paths(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        found.append(((*found[parent],) if parent != ROOT else ()) + (token,))
    return found


def random_tree(rng: random.Random, drafts: int) -> tuple[Guess, list[float]]:
    parents = [rng.randrange(ROOT, draft) for draft in range(drafts)]
    tokens: list[int] = []
    for draft, parent in enumerate(parents):
        taken = {tokens[other] for other in range(draft) if parents[other] == parent}
        tokens.append(rng.choice([token for token in range(drafts + 5) if token not in taken]))
    guess = Guess(tuple(tokens), tuple(parents), (0,) * drafts, (0.5,) * drafts)
    return guess, [rng.random() for _ in range(drafts)]


def test_what_two_propose_is_one_draft_of_the_more_hopeful():
    tree = DraftTree([Proposal("one", ONE, [0.5, 0.5, 0.5]), Proposal("other", OTHER, [0.6, 0.2, 0.9])])
    assert paths(tree.tokens, tree.parents) == [(5,), (5, 6), (5, 6, 7), (9,)]
    assert tree.authors == ["other", "other", "one", "other"]
    assert tree.chances == pytest.approx([0.6, 0.54, 0.27, 0.2])


def test_drafts_that_rule_each_other_out_have_no_more_than_certainty_together():
    guess = Guess((1, 2, 3), (ROOT,) * 3, (0,) * 3, (0.9,) * 3)
    assert sum(DraftTree([Proposal("one", guess, [0.9, 0.9, 0.9])]).chances) == pytest.approx(SUREST)


@pytest.mark.parametrize("seed", range(30))
def test_a_tree_holds_every_path_of_its_proposals_once(seed):
    rng = random.Random(seed)
    proposals = [
        Proposal(name, *random_tree(rng, rng.randrange(1, 12))) for name in ("a", "b", "c")[: 1 + seed % 3]
    ]
    tree = DraftTree(proposals)
    found = paths(tree.tokens, tree.parents)
    assert len(found) == len(set(found))
    assert set(found) == {
        path for one in proposals for path in paths(list(one.guess.tokens), list(one.guess.parents))
    }
    for draft, parent in enumerate(tree.parents):
        assert parent < draft
        assert tree.chances[draft] <= (tree.chances[parent] if parent != ROOT else 1.0)


@pytest.mark.parametrize("seed", range(30))
def test_a_window_shows_each_draft_what_it_follows_and_no_more(seed):
    rng = random.Random(seed)
    tree = DraftTree([Proposal("a", *random_tree(rng, 12))])
    drafts = tree.within(rng.randrange(1, 13))
    window = tree.window(drafts)
    whole = paths(tree.tokens, tree.parents)
    assert window.optional
    for index, draft in enumerate(drafts):
        assert window.depths[index] == len(whole[draft]) - 1
        assert (window.parents[index] == ROOT) == (tree.parents[draft] == ROOT)
        if window.visibility is Visibility.ANCESTORS:
            word = window.ancestors[index]
            seen = [window.tokens[bit] for bit in range(len(drafts)) if word >> bit & 1]
            assert tuple(seen) == whole[draft]
    if window.visibility is Visibility.CAUSAL:
        assert list(window.parents) == list(range(-1, len(drafts) - 1))


@pytest.mark.parametrize("seed", range(30))
def test_where_there_is_little_room_the_better_of_a_line_and_a_part_is_taken(seed):
    rng = random.Random(seed)
    tree = DraftTree([Proposal("a", *random_tree(rng, 12))])
    room = rng.randrange(8)
    drafts = tree.within(room)
    assert all(tree.parents[draft] in (ROOT, *drafts) for draft in drafts)
    is_line = [tree.parents[draft] for draft in drafts] == [ROOT, *drafts[:-1]]
    assert is_line or len(drafts) <= room
    best = sorted(tree.chances, reverse=True)[:room]
    assert sum(tree.chances[draft] for draft in drafts) >= sum(best) - 1e-9


def test_everyone_hears_what_became_of_its_own():
    tree = DraftTree([Proposal("one", ONE, [0.5, 0.5, 0.5]), Proposal("other", OTHER, [0.6, 0.2, 0.9])])
    computed, path = (0, 1, 3), (0, 1)  # 5, 5 6 and 9 were computed; 5 6 stood
    guess, stood = tree.part_of(0, computed, path)
    assert (guess.tokens, guess.kinds, stood) == ((5, 6), (0, 1), {0, 1})
    guess, stood = tree.part_of(1, computed, path)
    assert (guess.tokens, guess.parents, stood) == ((5, 9, 6), (ROOT, ROOT, 0), {0, 2})
    verified = {one.drafter: one for one in tree.verified(computed, path)}
    assert list(verified) == ["other"]
    assert (verified["other"].num_drafts, verified["other"].accepted) == (3, (0, 1))


def test_the_text_judges_drafts_beside_its_path_and_none_behind_them():
    tree = DraftTree([Proposal("one", ONE, [0.5] * 3), Proposal("other", OTHER, [0.6, 0.2, 0.9])])
    five, six, seven, nine = range(4)
    assert tree.beside([], [9]) == ({five, nine}, {nine}), "nothing was computed"
    assert tree.beside([five], [5, 6]) == ({five, six, nine}, {five, six}), "6 was not granted"
    assert tree.beside([five, six], [5, 6, 8]) == ({five, six, seven, nine}, {five, six})
    assert tree.beside([], []) == (set(), set())
    known, right = tree.beside([five], [5, 6])
    assert tree.part_of(0, known, right) == (line([5, 6], [0, 1], 0.5), {0, 1})
