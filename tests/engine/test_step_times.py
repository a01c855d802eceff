"""What the gauge of measured over predicted step times says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.core import LONG_STEP_S
from engine.messages import Submit
from engine.step_times import LOOK_EVERY, StepTimes
from scheduler.costs import CostModel
from scheduler.plan import Slice, StepPlan
from tests.engine.tiny import request, run, tiny_core

COSTS = CostModel(step_s=1.0, slice_s=0.1, token_s=0.01, context_s=0.0, pair_s=0.0)
PREDICTED_S = 1.0 + 2 * 0.1 + 4 * 0.01


def plan(number: int) -> StepPlan:
    """Steps number 1, 2, ... of those that are looked at: two slices, of one and of three tokens."""
    slices = tuple(
        Slice(seq_id, 5, (0,) * count, range(5, 5 + count), 0, (), 1) for seq_id, count in ((1, 1), (2, 3))
    )
    return StepPlan(number * LOOK_EVERY, slices)


def test_the_first_one_sets_the_ratio_and_later_ones_move_it_by_a_tenth() -> None:
    times = StepTimes(COSTS)
    times.note(replace(plan(1), step=1), 99.0)  # it loaded kernels
    assert times.ratio == 0.0
    times.note(plan(1), 2 * PREDICTED_S)
    assert times.ratio == pytest.approx(2.0)
    times.note(plan(2), 3 * PREDICTED_S)
    assert times.ratio == pytest.approx(2.1)


def test_a_machine_that_became_slower_shows_and_one_disturbed_step_is_forgotten() -> None:
    times = StepTimes(COSTS)
    times.note(plan(1), 50 * PREDICTED_S)
    for number in range(2, 120):
        times.note(plan(number), 1.5 * PREDICTED_S)
    assert times.ratio == pytest.approx(1.5, rel=0.01)


def test_costs_of_nothing_are_compared_with_nothing() -> None:
    times = StepTimes(CostModel(step_s=0.0, slice_s=0.0, token_s=0.0, pair_s=0.0))
    times.note(plan(1), 1.0)
    assert times.ratio == 0.0


def test_a_core_reports_it() -> None:
    core = tiny_core()
    assert core.step().step_time_ratio == 0.0, "nothing was computed"
    run(core, request("r", [3] * 20, max_tokens=3 * LOOK_EVERY))
    assert core.step().step_time_ratio > 0.0


def test_a_step_that_is_predicted_to_be_long_is_announced_and_others_are_not() -> None:
    core = tiny_core()
    announced: list[float] = []
    core.on_long_step = announced.append
    core.handle(Submit(request("r", [3] * 20, max_tokens=2)))
    core.step()
    assert not announced
    core.step_times.ratio = 1000.0  # steps have become slower than the costs say
    core.step()
    assert announced == [pytest.approx(1000 * core.scheduler.costs.step([(20, 1)]))]
    assert announced[0] > LONG_STEP_S
