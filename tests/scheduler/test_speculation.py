"""How many drafts are granted: those that raise the expected tokens per second, none when nothing does."""

from __future__ import annotations

import itertools
import random

import pytest

from scheduler.speculation import Candidate, StepEconomy, grant


def economy(**changes: float) -> StepEconomy:
    fields = {
        "step_s": 0.04,
        "num_committed": 1,
        "num_rows": 1,
        "row_block": 8,
        "block_s": 0.01,
        "draft_s": 0.001,
    }
    return StepEconomy(**fields | changes)  # type: ignore[arg-type]


def rate(chances: list[float], plan: StepEconomy) -> float:
    return (plan.num_committed + sum(chances)) / (plan.step_s + plan.added_s(len(chances)))


def test_likely_drafts_are_granted_and_hopeless_ones_are_not():
    sure, hopeless = Candidate(1, (0.9, 0.8, 0.7)), Candidate(2, (0.001,))
    assert grant([sure, hopeless], economy(), 100) == {1: 3}
    assert grant([hopeless], economy(), 100) == {}
    assert grant([], economy(), 100) == {}


def test_padding_is_cheap_and_a_new_block_must_pay_for_itself():
    line = Candidate(1, (0.2,) * 24)
    assert grant([line], economy(draft_s=0.0, block_s=0.03), 100) == {1: 7}
    assert grant([line], economy(draft_s=0.0, block_s=0.0), 100) == {1: 24}


def test_near_a_full_batch_nobody_speculates():
    """A token more costs there what it brings at best."""
    full = economy(step_s=0.3, num_committed=64, num_rows=64, block_s=0.04, draft_s=0.001)
    assert grant([Candidate(number, (0.6, 0.4)) for number in range(64)], full, 1000) == {}


def test_no_more_than_there_is_room_for():
    lines = [Candidate(number, (0.99,) * 8) for number in range(4)]
    granted = grant(lines, economy(block_s=0.0, draft_s=0.0), 5)
    assert sum(granted.values()) == 5
    assert grant(lines, economy(), 0) == {} == grant(lines, economy(), -3)


@pytest.mark.parametrize("seed", range(30))
def test_no_other_choice_of_prefixes_is_better(seed):
    rng = random.Random(seed)
    lines = []
    for number in range(rng.randrange(1, 4)):
        chances = sorted((rng.random() for _ in range(rng.randrange(1, 5))), reverse=True)
        lines.append(Candidate(number, tuple(chances)))
    plan = economy(
        num_rows=rng.randrange(1, 10), num_committed=rng.randrange(1, 4),
        block_s=rng.random() * 0.02, draft_s=rng.random() * 0.01,
    )  # fmt: skip
    granted = grant(lines, plan, 100)
    best = max(
        rate(
            [chance for line, count in zip(lines, counts, strict=True) for chance in line.chances[:count]],
            plan,
        )
        for counts in itertools.product(*(range(len(line.chances) + 1) for line in lines))
    )
    chosen = [chance for line in lines for chance in line.chances[: granted.get(line.seq_id, 0)]]
    assert rate(chosen, plan) == pytest.approx(best)
