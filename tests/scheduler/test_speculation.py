"""How many drafts are granted: those that raise the expected tokens per second, none when nothing does."""

from __future__ import annotations

import itertools
import random

import pytest

from scheduler.speculation import LEAST_GAIN, Candidate, StepEconomy, grant, may_pay
from scheduler.types import Window
from tests.scheduler.driver import Driver, request


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
    assert grant([sure, hopeless], economy(), 100) == {1: (0, 1, 2)}
    assert grant([hopeless], economy(), 100) == {}
    assert grant([], economy(), 100) == {}


def test_padding_is_cheap_and_a_new_block_must_pay_for_itself():
    line = Candidate(1, (0.2,) * 24)
    assert grant([line], economy(draft_s=0.0, block_s=0.03), 100) == {1: tuple(range(7))}
    assert grant([line], economy(draft_s=0.0, block_s=0.0), 100) == {1: tuple(range(24))}


def test_near_a_full_batch_nobody_speculates():
    """A token more costs there what it brings at best."""
    full = economy(step_s=0.3, num_committed=64, num_rows=64, block_s=0.04, draft_s=0.001)
    assert grant([Candidate(number, (0.6, 0.4)) for number in range(64)], full, 1000) == {}


def test_no_more_than_there_is_room_for():
    lines = [Candidate(number, (0.99,) * 8) for number in range(4)]
    granted = grant(lines, economy(block_s=0.0, draft_s=0.0), 5)
    assert sum(map(len, granted.values())) == 5
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
    chosen = [chance for line in lines for chance in line.chances[: len(granted.get(line.seq_id, ()))]]
    if best >= LEAST_GAIN * rate([], plan):
        assert rate(chosen, plan) == pytest.approx(best)
    else:
        assert not chosen


@pytest.mark.parametrize("seed", range(30))
def test_with_a_draft_comes_all_that_it_follows(seed):
    rng = random.Random(seed)
    trees = {}
    for number in range(rng.randrange(1, 4)):
        parents, chances = [], []
        for draft in range(rng.randrange(1, 12)):
            parents.append(rng.randrange(-1, draft))
            before = chances[parents[-1]] if parents[-1] >= 0 else 1.0
            chances.append(before * rng.choice([1.0, 0.5, 0.9]))
        trees[number] = parents, Candidate(number, tuple(chances))
    plan = economy(block_s=rng.random() * 0.02, draft_s=rng.random() * 0.01)
    for number, drafts in grant([tree for _, tree in trees.values()], plan, rng.randrange(30)).items():
        parents, _ = trees[number]
        assert drafts == tuple(sorted(drafts))
        assert all(parents[draft] in (-1, *drafts) for draft in drafts)


@pytest.mark.parametrize("seed", range(60))
def test_drafts_may_pay_exactly_if_certain_ones_would_be_granted(seed):
    rng = random.Random(seed)
    plan = economy(
        num_rows=rng.randrange(1, 20), num_committed=rng.randrange(1, 20),
        block_s=rng.random() * 0.2, draft_s=rng.random() * 0.01,
    )  # fmt: skip
    most = rng.randrange(1, 30)
    granted = grant([Candidate(1, (1.0,) * most)], plan, most)
    if granted:
        assert may_pay(plan, most)
    elif may_pay(plan, most):  # by less than is worth it
        rates = [rate([1.0] * count, plan) for count in range(most + 1)]
        assert rates[0] < max(rates) < LEAST_GAIN * rates[0]


def test_nothing_pays_where_steps_cost_nothing():
    assert not may_pay(economy(step_s=0.0), 10)


def test_nobody_behind_a_draft_goes_short_of_a_page_or_token_for_it():
    def offered(num_drafts: int, **settings: int) -> dict[str, int]:
        driver = Driver(**settings)
        driver.add(request("a", 3, max_tokens=9, method="drafts"), request("b", 4, max_tokens=8))
        driver.step()
        [sequence] = driver.scheduler.draftable("drafts")
        drafts = Window((7,) * num_drafts, tuple(range(num_drafts)), optional=True)
        driver.scheduler.offer(sequence.seq_id, drafts)
        plan = driver.plan()
        assert not plan.preempted
        assert driver.scheduler.stats().num_running == 2
        return {driver.names[piece.seq_id]: len(piece.tokens) for piece in plan.slices}

    assert offered(2, num_pages=4) == {"a.0": 3, "b.0": 1}
    assert offered(6, num_pages=4) == {"a.0": 1, "b.0": 1}, "b needs one of the last pages"
    assert offered(6, max_num_batched_tokens=7) == {"a.0": 1, "b.0": 1}, "b needs the last token"
