"""Who loses rests, ever longer; who wins goes on."""

from __future__ import annotations

import random

import pytest

from engine.drafting.ledger import FIRST_SHARE, LONGEST_REST, SHORTEST_REST, Ledger, most_credit


def play(ledger: Ledger, num_steps: int, won: float, num_committed: int = 1) -> int:
    """-> in how many of the steps there was speculation"""
    count = 0
    for _ in range(num_steps):
        if ledger.may_speculate(num_committed):
            ledger.note(num_committed, won)
            count += 1
    return count


@pytest.mark.parametrize("loss", [0.01, 0.1, 1.0, 3.0])
def test_who_always_loses_loses_little(loss):
    lost = loss * play(Ledger(), 20 * LONGEST_REST, -loss)
    num_stakes = 8 + 20  # while rests grow, then with each of the longest
    assert lost <= num_stakes * (FIRST_SHARE * most_credit(1) + loss)
    assert lost < 0.01 * 20 * LONGEST_REST


def test_the_first_steps_lose_no_more_than_a_stake():
    assert play(Ledger(), SHORTEST_REST, -0.5) == 4


def test_who_wins_always_goes_on():
    rng = random.Random(5)
    ledger = Ledger()
    for _ in range(1000):
        assert ledger.may_speculate(1)
        ledger.note(1, rng.choice((0.9, -0.3)))


def test_who_begins_to_win_is_found_after_a_rest_and_rests_shortly_again():
    ledger = Ledger()
    play(ledger, 10 * LONGEST_REST, -1.0)
    assert play(ledger, 2 * LONGEST_REST, 0.5) > LONGEST_REST
    play(ledger, 20, -1.0)
    assert play(ledger, SHORTEST_REST, 0.5) > 0, "what was lost before is forgiven"


def test_winning_much_licenses_no_long_loss():
    ledger = Ledger()
    play(ledger, 1000, 5.0)
    assert play(ledger, SHORTEST_REST, -1.0) == most_credit(1) + 1


def test_where_many_sequences_level_out_luck_less_may_be_lost():
    ledger = Ledger()
    play(ledger, 100, 5.0, num_committed=32)
    assert 0.1 * play(ledger, SHORTEST_REST, -0.1, num_committed=32) < 1.3


def test_each_load_has_its_own_stake():
    ledger = Ledger()
    play(ledger, 100, -1.0, num_committed=32)
    assert not ledger.may_speculate(33)
    assert ledger.may_speculate(1)
    assert ledger.may_speculate(16)
