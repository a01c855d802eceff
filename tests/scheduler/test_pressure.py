"""Pages for a twentieth of the demand: everything ends, with the right text."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from scheduler.clock import ManualClock
from scheduler.config import POLICIES, SchedulerConfig
from scheduler.costs import CostModel
from scheduler.fake_runner import FakeRunner, true_output
from scheduler.fake_tiers import FakeTiers
from scheduler.invariants import check_empty
from scheduler.plan import SchedulerStats
from scheduler.scheduler import Scheduler
from scheduler.types import Request, SamplingParams

if TYPE_CHECKING:
    from scheduler.types import FinishReason

PAGE_SIZE = 4
MAX_MODEL_LEN = 96
COSTS = CostModel(step_s=0.006, slice_s=3e-5, token_s=2.5e-5, pair_s=0.0)


def _requests() -> list[Request]:
    rng = random.Random(0)
    requests = []
    for number in range(240):
        prompt = tuple(rng.randrange(50) for _ in range(min(40, int(rng.lognormvariate(2.0, 0.8)) + 2)))
        sampling = SamplingParams(seed=number, max_tokens=min(50, int(rng.lognormvariate(3.0, 0.8)) + 1))
        requests.append(
            Request(
                request_id=str(number),
                prompt_ids=prompt,
                sampling=sampling,
                arrival_s=number * 1e-3,
                priority=number % 3,
            )
        )
    return requests


def _run(policy: str, victims: str, host_pages: int, growth_share: float = 0.0) -> SchedulerStats:
    """Serve all requests with pages for 5 % of what they need together; every text is checked."""
    requests, rng, clock = _requests(), random.Random(1), ManualClock()
    demand = sum(-(-(len(one.prompt_ids) + one.sampling.max_tokens) // PAGE_SIZE) for one in requests)
    config = SchedulerConfig(
        policy=policy,
        victims=victims,
        page_size=PAGE_SIZE,
        num_pages=demand // 20,
        host_pages=host_pages,
        max_num_seqs=32,
        max_num_batched_tokens=64,
        max_queued_requests=1000,
        reserve_share=0.0,
        growth_share=growth_share,
    )
    scheduler = Scheduler(config, clock, MAX_MODEL_LEN, COSTS)
    tiers = FakeTiers(rng, config.num_pages, PAGE_SIZE, failing=0.0, slowness=0.3)
    runner = FakeRunner(scheduler, rng, set(), tiers)
    outputs: dict[str, tuple[int, ...]] = {one.request_id: () for one in requests}
    ends: dict[str, FinishReason] = {}
    for one in requests:
        scheduler.add(one)
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        scheduler.copied(tiers.finished())
        plan = scheduler.plan()
        tiers.start(plan.copies)
        for news in scheduler.apply(plan, runner.execute(plan)):
            outputs[news.request_id] += news.tokens
            if news.finish is not None:
                ends[news.request_id] = news.finish
        clock.advance(COSTS.step((piece.start, len(piece.tokens)) for piece in plan.slices))
    for one in requests:
        assert (outputs[one.request_id], ends[one.request_id]) == true_output(one, 0, MAX_MODEL_LEN)
    check_empty(scheduler)
    return scheduler.stats()


@pytest.mark.parametrize("victims", ["cheapest", "last"])
@pytest.mark.parametrize("policy", POLICIES)
def test_everything_ends_with_the_right_text(policy: str, victims: str) -> None:
    stats = _run(policy, victims, host_pages=0)
    assert stats.num_preempted_for_pages > 0


@pytest.mark.parametrize("policy", ["mlfq", "fcfs"])
def test_with_host_pages_too(policy: str) -> None:
    stats = _run(policy, "cheapest", host_pages=1000)
    assert stats.num_pages_up > 0


@pytest.mark.parametrize("policy", ["mlfq", "fcfs"])
def test_room_to_grow_halves_what_is_computed_twice(policy: str) -> None:
    """Against admitting whatever fits now and preempting the last in order."""
    default = SchedulerConfig()
    before = _run(policy, "last", host_pages=0)
    after = _run(policy, default.victims, host_pages=0, growth_share=default.growth_share)
    assert after.recomputed_tokens <= before.recomputed_tokens / 2
