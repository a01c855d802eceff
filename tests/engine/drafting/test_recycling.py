"""Token recycling: what every row says of its token comes back as a tree, the likeliest first."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.drafting.guess import NO_GUESS, ROOT, Guess, Seen, Want
from engine.drafting.recycling import CANDIDATES, MAX_DRAFTS, MAX_ROWS, Recycling, largest

VOCAB = 1000
MAX_BYTES = 2**25


def sequence(last: int, salt: str = "") -> SimpleNamespace:
    return SimpleNamespace(tokens=[1, last], request=SimpleNamespace(cache_salt=salt))


def seen(tokens: list[int], rows: list[list[int]], kept: tuple[int, ...] = (), salt: str = "") -> Seen:
    """Each row says what follows its token, the likeliest first."""
    logits = torch.zeros(len(rows), VOCAB)
    for row, best in enumerate(rows):
        for rank, token in enumerate(best):
            logits[row, token] = 30.0 - rank
    drawn = tuple(best[0] for best in rows)
    parents = tuple(range(ROOT, len(tokens) - 2))
    return Seen(sequence(tokens[0], salt), 1, tuple(tokens), parents, drawn, kept, (), logits)


def guess(drafter: Recycling, last: int, limit: int = 8, salt: str = "") -> Guess:
    [found] = drafter.guess([Want(sequence(last, salt), limit)])
    return found


def paths(found: Guess) -> list[tuple[int, ...]]:
    whole: list[tuple[int, ...]] = []
    for token, parent in zip(found.tokens, found.parents, strict=True):
        whole.append((*(whole[parent] if parent != ROOT else ()), token))
    return whole


def test_candidates_come_back_as_a_tree_the_likeliest_first():
    drafter = Recycling(VOCAB, MAX_BYTES)
    drafter.observe([seen([10, 20], [[20, 21, 22], [30, 31, 32]])])
    assert paths(guess(drafter, 10, limit=4)) == [(20,), (21,), (20, 30), (22,)]
    assert paths(guess(drafter, 20, limit=2)) == [(30,), (31,)]
    assert guess(drafter, 30) == NO_GUESS
    assert guess(drafter, 10, limit=0) == NO_GUESS


def test_rows_of_rejected_drafts_teach():
    drafter = Recycling(VOCAB, MAX_BYTES)
    drafter.observe([seen([10, 77], [[20, 21], [80, 81]])])  # 77 was wrong: 20 came
    assert paths(guess(drafter, 77, limit=2)) == [(80,), (81,)]


def test_what_was_said_again_and_again_leads_deep():
    drafter = Recycling(VOCAB, MAX_BYTES)
    for _ in range(3):
        drafter.observe([seen([10, 11, 12, 13], [[11, 50], [12, 51], [13, 52], [14, 53]], kept=(0, 1, 2))])
    found = guess(drafter, 10, limit=4)
    assert paths(found) == [(11,), (11, 12), (11, 12, 13), (11, 12, 13, 14)]
    once = Recycling(VOCAB, MAX_BYTES)
    once.observe([seen([10], [[11, 50]])])
    assert guess(once, 10, limit=1).kinds != guess(drafter, 10, limit=1).kinds
    assert guess(once, 10, limit=1).beliefs < guess(drafter, 10, limit=1).beliefs
    drafter.observe([seen([10], [[40, 11]])])
    assert guess(drafter, 10, limit=1).tokens == (40,), "the latest counts"
    assert guess(drafter, 10, limit=1).beliefs == guess(once, 10, limit=1).beliefs


def test_nothing_is_told_across_salts():
    drafter = Recycling(VOCAB, MAX_BYTES)
    drafter.observe([seen([10], [[11]], salt="a")])
    assert guess(drafter, 10, salt="b") == NO_GUESS
    assert guess(drafter, 10, limit=1, salt="a").tokens == (11,)


def test_any_table_gives_proper_trees():
    rng = random.Random(1)
    for size in (3, 40, VOCAB):
        drafter = Recycling(size, MAX_BYTES)
        for _ in range(60):
            count = rng.choice([1, 2, 5, 9])
            tokens = tuple(rng.randrange(min(size, 30)) for _ in range(count))
            logits = torch.randn(count, size)
            logits[:, 30:] -= 5
            one = Seen(sequence(tokens[0]), 1, tokens, (), tokens, (), (), logits)
            drafter.observe([one, one._replace(drawn=(), logits=None)])
            limit = rng.randrange(40)
            found = guess(drafter, rng.randrange(size), limit)
            assert len(found.tokens) <= min(limit, MAX_DRAFTS)
            assert len(found.tokens) == len(found.parents) == len(found.kinds) == len(found.beliefs)
            assert len(set(paths(found))) == len(found.tokens), "siblings that are the same"
            for draft, (token, parent) in enumerate(zip(found.tokens, found.parents, strict=True)):
                assert ROOT <= parent < draft
                assert 0 <= token < size


def test_a_line_of_the_same_token_ends():
    drafter = Recycling(VOCAB, MAX_BYTES)
    for _ in range(5):
        drafter.observe([seen([7], [[7, 8]])])
    assert len(guess(drafter, 7, limit=100).tokens) <= MAX_DRAFTS


def test_of_too_many_rows_those_of_paths_that_stood_are_taken_and_everyone_has_a_turn():
    drafter = Recycling(VOCAB, MAX_BYTES)
    first = seen([5, 100, 101], [[6], [7], [8]], kept=(1,))
    crowd = [seen([200 + n], [[300]]) for n in range(MAX_ROWS)]
    drafter.observe([first, *crowd])
    assert guess(drafter, 5) != NO_GUESS
    assert guess(drafter, 101) != NO_GUESS
    assert guess(drafter, 100) == NO_GUESS, "a draft that was rejected"
    late = 200 + MAX_ROWS - 1
    assert guess(drafter, late) == NO_GUESS
    drafter.observe([first, *crowd])
    assert guess(drafter, late) != NO_GUESS


def test_without_room_for_one_table_nothing_is_guessed():
    drafter = Recycling(VOCAB, 1000)
    drafter.observe([seen([10], [[11]])])
    assert guess(drafter, 10) == NO_GUESS
    assert not drafter._tables


def test_memory_is_bounded_whatever_the_salts_and_a_new_table_is_cheap():
    drafter = Recycling(50_000, MAX_BYTES)
    table = drafter._table("")
    assert table.tokens.nbytes + table.times.nbytes < 2e6
    for number in range(1000):
        drafter._table(f"salt{number}")
    held = sum(one.tokens.nbytes + one.times.nbytes for one in drafter._tables.values())
    assert held <= MAX_BYTES
    assert "salt999" in drafter._tables
    assert "" not in drafter._tables


@pytest.mark.parametrize("size", [8, 100, 128, 1024, 1025, 1151, 49_152, 50_257])
def test_the_largest_are_those_of_topk(size):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(5, size, generator=generator)
    logits[0, -3:] += 10.0
    logits[1, :CANDIDATES] += 10.0
    logits[2] = -torch.inf
    logits[2, size // 2] = 0.0
    places = largest(logits, CANDIDATES)
    assert torch.equal(logits.gather(1, places), logits.topk(CANDIDATES).values)
    assert all(len(np.unique(row)) == CANDIDATES for row in places.numpy())
