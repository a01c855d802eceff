"""What steps teach about the cost of drafts."""

from __future__ import annotations

import pytest

from engine.drafting.costs import DraftCosts
from scheduler.costs import CostModel
from scheduler.plan import Slice, StepPlan


def step(num_drafts: int = 0, number: int = 0) -> StepPlan:
    tokens = tuple(range(1 + num_drafts))
    return StepPlan(number, (Slice(1, 50, tokens, tokens, 0, (), 1 + num_drafts, num_window=num_drafts),), ())


def test_a_machine_many_times_slower_than_was_measured_is_known_after_a_while():
    model = CostModel()
    costs = DraftCosts(model, 8)
    for _ in range(200):
        costs.note(step(), 20 * model.step([(50, 1)]))
    assert costs.scale == pytest.approx(20, rel=0.02)


def test_what_drafts_add_is_found_again():
    model = CostModel()
    costs = DraftCosts(model, 8)
    for number in range(1200):
        drafts = (0, 3, 7, 10, 15, 20)[number % 6]
        blocks = -(-(1 + drafts) // 8) - 1
        costs.note(step(drafts), model.step([(50, 1)]) + 0.009 * blocks + 0.0004 * drafts)
    assert costs.block_s == pytest.approx(0.009, rel=0.1)
    assert costs.draft_s == pytest.approx(0.0004, rel=0.25)


def test_a_machine_file_of_zeros_teaches_nothing():
    costs = DraftCosts(CostModel(step_s=0, slice_s=0, token_s=0, context_s=0, pair_s=0), 8)
    costs.note(step(), 0.1)
    costs.note(step(3), 0.1)
    assert costs.scale == 1.0
