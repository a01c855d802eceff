"""Who is asked to draft: whoever gains more than the time of its guesses costs."""

from __future__ import annotations

import pytest

from engine.drafting.yields import BORNE_BY, SHORTEST_PAUSE, Yields

RATE = 20.0  # tokens a second


class World:
    """A source that takes so long for a call and for each sequence, and gains so much for each."""

    def __init__(self, fixed_s: float, each_s: float, gain: dict[int, int]) -> None:
        self.now_s = 0.0
        self.yields = Yields(lambda: self.now_s)
        self.fixed_s, self.each_s, self.gain = fixed_s, each_s, gain
        self.guessing_s = 0.0
        self.reads = False  # it only reads

    def step(self, rivals: dict[int, float] | None = None) -> list[int]:
        if rivals is None:
            rivals = dict.fromkeys(self.gain, 0.0)
        asked = self.yields.worth_asking("x", rivals, RATE)
        if asked:
            seconds = self.fixed_s + self.each_s * len(asked)
            self.now_s += seconds
            self.guessing_s += seconds
            self.yields.took("x", len(asked), seconds, num_behind=len(asked) * self.reads)
            self.yields.gained("x", [(seq_id, self.gain[seq_id]) for seq_id in asked if not self.reads])
        self.now_s += 0.05
        return asked


def test_who_pays_is_always_asked():
    world = World(0.01, 0.0, {1: 1, 2: 2})
    assert len(world.step()) == 1, "the first time, as nobody knows the price"
    assert all(world.step() == [1, 2] for _ in range(200))


def test_who_does_not_pay_is_tried_for_a_small_share_of_the_time():
    world = World(0.1, 0.0, {1: 1})  # two tokens' time for one
    for _ in range(2000):
        world.step()
    assert 0 < world.guessing_s < world.now_s / SHORTEST_PAUSE


def test_it_is_found_again_when_it_begins_to_pay():
    world = World(0.02, 0.0, {1: 0})
    for _ in range(300):
        world.step()
    assert not world.step()
    world.gain = {1: 4}
    for _ in range(4000):
        world.step()
    assert all(world.step() for _ in range(20))


def test_only_those_sequences_for_which_it_pays_are_asked():
    world = World(0.0, 0.01, {1: 0, 2: 3})
    for _ in range(100):
        world.step()
    assert [world.step() for _ in range(20)].count([2]) >= 18


def test_what_others_are_expected_to_gain_counts_against_it():
    world = World(0.01, 0.0, {1: 2})
    for _ in range(50):
        world.step()
    assert world.step({1: 1.0}) == [1]
    assert world.step({1: 1.9}) == []


@pytest.mark.parametrize(("fixed_s", "each_s"), [(0.02, 0.001), (0.0, 0.005), (0.03, 0.0)])
def test_the_time_of_a_call_is_split(fixed_s, each_s):
    yields = Yields(lambda: 0.0)
    yields.worth_asking("x", {1: 0.0}, RATE)
    for number in range(200):
        count = 1 + number % 8
        yields.took("x", count, fixed_s + each_s * count)
    assert yields._sources["x"].time.fixed_and_each() == pytest.approx((fixed_s, each_s), abs=1e-6)


def test_who_guesses_bears_the_time_of_reading_whoever_still_reads():
    """Prompts come all the time, so that some are always read: that time is in the price too."""
    yields = Yields(lambda: 0.0)
    yields.worth_asking("x", {1: 0.0}, RATE)
    for _ in range(500):
        yields.took("x", 4, 0.1, num_behind=1)
    assert yields._sources["x"].time.expected_s(4) == pytest.approx(0.1, rel=0.05)
    assert yields._sources["x"].debt_s < 0.1 * BORNE_BY


def test_one_long_prompt_is_borne_by_many_guesses():
    yields = Yields(lambda: 0.0)
    yields.worth_asking("x", {1: 0.0}, RATE)
    for _ in range(5):
        yields.took("x", 1, 1.0, num_behind=1)
    assert yields._sources["x"].time.expected_s(1) == 0.0, "nothing was guessed yet"
    yields.took("x", 1, 0.01)
    assert yields._sources["x"].time.expected_s(1) == pytest.approx(0.01 + 5.0 / BORNE_BY)
    for _ in range(500):
        yields.took("x", 1, 0.01)
    assert yields._sources["x"].time.expected_s(1) == pytest.approx(0.01, rel=0.1)


def test_who_never_catches_up_any_more_is_tried_for_a_small_share_of_the_time():
    """Prompts come faster than they are read: nothing is ever gained of what that takes, be it little."""
    world = World(0.01, 0.0, {1: 2})
    for _ in range(200):
        assert world.step(), "it pays while there is time to guess"
    world.reads, world.gain = True, {2: 2}
    for _ in range(2000):
        world.step()
    begun_s, spent_s = world.now_s, world.guessing_s
    for _ in range(2000):
        world.step()
    assert 0 < world.guessing_s - spent_s < (world.now_s - begun_s) / SHORTEST_PAUSE
    world.reads = False
    for _ in range(20_000):
        world.step()
    assert all(world.step() for _ in range(50)), "it has time again"


def test_nothing_is_kept_of_who_has_ended():
    world = World(0.0, 0.0, {1: 1})
    world.step()
    world.yields.release(1)
    assert not world.yields._sources["x"].own


def test_what_does_not_pay_in_a_full_batch_may_pay_in_a_small_one():
    world = World(0.0, 0.0001, {1: 0})
    world.yields.at(32)
    for _ in range(300):
        world.step()
    assert not world.step()
    world.yields.at(1)
    world.gain = {1: 2}
    for _ in range(20):
        world.step()
    assert all(world.step() for _ in range(50))


def test_a_trial_at_one_load_is_none_soon_after_at_another():
    world = World(0.5, 0.0, {1: 0})
    assert world.step() == [1]
    for load in (2, 4, 8, 16, 32):
        world.yields.at(load)
        assert not world.step()
