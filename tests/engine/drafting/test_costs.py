"""What steps teach about the cost of drafts."""

from __future__ import annotations

import pytest

from engine.drafting.costs import DraftCosts
from scheduler.costs import CostModel
from scheduler.plan import Slice, StepPlan
from scheduler.speculation import StepEconomy


def step(num_drafts: int = 0, number: int = 0) -> StepPlan:
    tokens = tuple(range(1 + num_drafts))
    return StepPlan(number, (Slice(1, 50, tokens, tokens, 0, (), 1 + num_drafts, num_window=num_drafts),), ())


ONE = [(50, 1)]  # the slices of such a step without drafts


def found(costs: DraftCosts) -> StepEconomy:
    return costs.economy(ONE, 1)


def test_a_machine_many_times_slower_than_was_measured_is_known_after_a_while():
    costs = DraftCosts(CostModel(), 8)
    for _ in range(200):
        costs.note(step(), 20 * costs.costs.step(ONE))
    assert found(costs).step_s == pytest.approx(20 * costs.costs.step(ONE), rel=0.02)


def test_what_drafts_add_is_found_again():
    costs = DraftCosts(CostModel(), 8)
    for number in range(1200):
        drafts = (0, 3, 7, 10, 15, 20)[number % 6]
        blocks = -(-(1 + drafts) // 8) - 1
        first_s = 0.004 if drafts else 0.0
        costs.note(step(drafts), costs.costs.step(ONE) + first_s + 0.009 * blocks + 0.0004 * drafts)
    for drafts, seconds in ((3, 0.0052), (10, 0.017), (20, 0.03)):
        assert found(costs).added_s(drafts) == pytest.approx(seconds, rel=0.1, abs=0.001)


def test_steps_that_nearly_all_have_as_many_drafts_are_told_from_plain_ones():
    costs = DraftCosts(CostModel(), 8)
    num_plain = 0
    for _ in range(500):
        drafts = 0 if costs.lacks_plain(ONE) else 15
        num_plain += not drafts
        blocks = -(-(1 + drafts) // 8) - 1
        costs.note(step(drafts), 0.4 * costs.costs.step(ONE) + 0.02 * blocks + 0.001 * drafts)
    assert num_plain < 500 / 16
    assert found(costs).step_s == pytest.approx(0.4 * costs.costs.step(ONE), rel=0.1)
    assert found(costs).added_s(15) == pytest.approx(0.035, rel=0.1)


def test_each_load_is_known_by_itself():
    costs = DraftCosts(CostModel(), 8)
    for _ in range(50):
        costs.note(step(), 2 * costs.costs.step(ONE))
    assert not costs.lacks_plain(ONE)
    many = ONE * 32
    assert costs.lacks_plain(many)
    assert costs.economy(many, 32).step_s == pytest.approx(costs.costs.step(many))


def test_a_step_with_a_prompt_shows_nothing_and_need_not_be_plain():
    costs = DraftCosts(CostModel(), 8)
    assert not costs.lacks_plain([(50, 1), (0, 64)])


def test_a_machine_file_of_zeros_teaches_nothing():
    costs = DraftCosts(CostModel(step_s=0, slice_s=0, token_s=0, context_s=0, pair_s=0), 8)
    costs.note(step(), 0.1)
    costs.note(step(3), 0.1)
    assert costs.economy(ONE, 1).step_s == 0.0


def test_a_plain_step_that_seemed_to_take_no_time_is_soon_known_again():
    """Steps with few drafts that were much faster than others had let drafts take all of the time."""
    costs = DraftCosts(CostModel(), 8)
    predicted_s = costs.costs.step(ONE)
    for number in range(300):
        drafts = (15, 3, 20, 7, 1)[number % 5] if number % 25 else 0
        blocks = -(-(1 + drafts) // 8) - 1
        share = 0.01 if 0 < drafts < 8 else 0.12 + 0.8 * blocks
        costs.note(step(drafts), share * predicted_s)
    assert found(costs).step_s < 0.01 * predicted_s
    for _ in range(100):
        costs.note(step(), 0.12 * predicted_s)
    assert found(costs).step_s > 0.08 * predicted_s
