"""Seeded simulations of whole workloads: `python -m scheduler.simulate --seeds 10000`.

One seed makes one small world: a configuration (often too few pages, places or tokens), requests
that share prefixes, arrive, fail, expire and are aborted at random, a runner that commits 0..n tokens a
step, and copies between tiers that are slow or fail. Steps fail, the clock jumps, the engine dies and
its requests are replayed on a new one. After every step the checker recomputes all invariants. At the
end every accepted choice must have had its exact text and one end, and nothing may be left anywhere.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from scheduler.clock import ManualClock
from scheduler.config import POLICIES, VICTIMS, SchedulerConfig
from scheduler.costs import CostModel
from scheduler.fake_runner import METHODS, VOCABULARY, FakeRunner, true_output
from scheduler.fake_tiers import FakeTiers
from scheduler.invariants import check, check_decisions, check_empty, check_entered
from scheduler.plan import Advance, Tier
from scheduler.refusal import RequestRefused
from scheduler.scheduler import Scheduler
from scheduler.spans import NO_PAGE, Spans
from scheduler.types import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scheduler.plan import Progress, StepPlan

MAX_MODEL_LEN = 48
_MAX_STEM = 24  # tokens of a beginning that requests share


@dataclass(frozen=True, slots=True)
class Report:
    """What one simulation went through."""

    num_steps: int
    totals: dict[str, int]
    finishes: frozenset[FinishReason]


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong in one world. Chances are per step or per copy; steps are counted from 1."""

    aborts: float
    failing_copies: float
    slow_copies: float
    clock_jumps: float
    failing_steps: frozenset[int]
    dying_steps: frozenset[int]


@dataclass(slots=True)
class _Ledger:
    """What the clients have: the output so far and the end of each accepted choice."""

    requests: dict[str, Request] = field(default_factory=dict)
    outputs: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    finishes: dict[tuple[str, int], FinishReason] = field(default_factory=dict)
    aborted: set[tuple[str, int]] = field(default_factory=set)

    def accept(self, request: Request) -> None:
        self.requests[request.request_id] = request
        for index in range(request.num_choices):
            delivered = request.delivered[index] if index < len(request.delivered) else ()
            self.outputs[request.request_id, index] = list(delivered)


class Simulation:
    def __init__(self, seed: int, policy: str | None = None) -> None:
        self._rng = random.Random(seed)
        self._clock = ManualClock(self._rng.uniform(0.0, 100.0))
        drawn = self._rng.choice(POLICIES)
        self._spans = draw_spans(self._rng)
        self._config = draw_config(self._rng, policy or drawn, self._spans)
        self._costs = draw_costs(self._rng)
        self._faults = draw_faults(self._rng)
        self._failing: set[tuple[str, int]] = set()
        self._ledger = _Ledger()
        self._prompt_logits: dict[tuple[str, int], list[int]] = {}
        self._start_engine({}, {})
        self._arrivals = draw_requests(self._rng, self._clock())
        self._totals = Counter[str]()
        for request in self._arrivals:
            if self._rng.random() < 0.05:
                self._failing.add((request.request_id, self._rng.randrange(request.num_choices)))

    def _start_engine(self, disk_index: dict[bytes, int], disk: dict[tuple[Tier, int], list[int]]) -> None:
        """A new engine process: what lies on the disk is all that it knows."""
        config, faults = self._config, self._faults
        self._scheduler = Scheduler(
            config, self._clock, MAX_MODEL_LEN, self._costs, disk_index=disk_index, spans=self._spans
        )
        self._tiers = FakeTiers(
            self._rng, config.num_pages, config.page_size, faults.failing_copies, faults.slow_copies
        )
        self._tiers.pages.update(disk)
        self._runner = FakeRunner(self._scheduler, self._rng, self._failing, self._tiers)
        self._prompt_logits = self._runner.prompt_logits

    def run(self) -> Report:
        """Run to the end. Raises AssertionError when anything is not as it must be."""
        choices = sum(request.num_choices for request in self._arrivals)
        max_steps = 400 + 100 * choices * MAX_MODEL_LEN
        num_steps = 0
        while self._arrivals or self._scheduler.has_work:
            num_steps += 1
            self._step(num_steps)
            assert num_steps <= max_steps, f"no end after {num_steps} steps: a livelock"
        check_empty(self._scheduler)
        self._check_ledger()
        self._count_engine()
        return Report(num_steps, dict(self._totals), frozenset(self._ledger.finishes.values()))

    def _step(self, number: int) -> None:
        scheduler = self._scheduler
        self._clock.advance(self._rng.expovariate(20.0))
        if self._rng.random() < self._faults.clock_jumps:
            self._clock.advance(self._rng.uniform(1.0, 100.0))
        self._let_arrive()
        self._maybe_abort()
        scheduler.copied(self._tiers.finished())
        offered = set(scheduler._tiers.disk.page_of.values())
        assert self._tiers.damaged.isdisjoint(offered), "a damaged page of the disk is offered again"
        self._receive(scheduler.expire())
        running = set(scheduler._places.running)
        waiting = {piece.seq_id for piece in scheduler._places.waiting}
        self._totals["drafts"] += self._runner.offer_drafts()
        plan = scheduler.plan()
        idle = not scheduler._sequences or scheduler._tiers.in_flight
        assert plan.slices or idle, "sequences are alive, and none computes"
        check_decisions(scheduler, plan, running, waiting)
        self._totals["shared"] += len(plan.shared)
        self._totals["slid"] += any(NO_PAGE in one.pages for one in scheduler._places.running.values())
        self._tiers.start(plan.copies)
        if number in self._faults.dying_steps and self._rng.random() < 0.5:
            self._die()
            return
        advances = self._execute(plan, number)
        self._maybe_abort()
        progress = scheduler.apply(plan, advances)
        check(scheduler)
        if number in self._faults.dying_steps:
            self._die()  # before anybody heard of the step
            return
        self._receive(progress)

    def _execute(self, plan: StepPlan, number: int) -> list[Advance]:
        """The k-th step may fail as a whole: then all of its sequences do, as in the engine."""
        if number not in self._faults.failing_steps:
            return self._runner.execute(plan)
        sequences = [self._scheduler.sequence(piece.seq_id) for piece in plan.slices]
        self._failing.update((piece.request.request_id, piece.index) for piece in sequences)
        return [Advance(piece.seq_id, (), 0, error="the step failed") for piece in plan.slices]

    def _die(self) -> None:
        """The engine process is gone. A new one gets every request in flight, with what was delivered,
        as the client's journal replays it."""
        self._totals["deaths"] += 1
        self._count_engine()
        index = dict(self._scheduler._tiers.disk.page_of)
        self._start_engine(index, self._tiers.disk())
        for request in self._ledger.requests.values():
            choices = [(request.request_id, index) for index in range(request.num_choices)]
            if all(choice in self._ledger.finishes for choice in choices):
                continue
            delivered = tuple(tuple(self._ledger.outputs[choice]) for choice in choices)
            self._scheduler.add(replace(request, delivered=delivered, readmitted=True))
            for choice in choices:
                if choice in self._ledger.finishes or choice in self._ledger.aborted:
                    self._receive(self._scheduler.abort(*choice))
        check(self._scheduler)

    def _count_engine(self) -> None:
        stats = self._scheduler.stats()
        self._totals.update(
            preemptions=stats.num_preemptions,
            hits=stats.prefix_hit_tokens,
            recomputed=stats.recomputed_tokens,
            fetched=stats.num_pages_up,
            down=sum(tier.num_in for tier in stats.tiers),
            overdue=stats.num_overdue,
            kept=stats.num_resumed_kept,
            parked=self._scheduler._places.num_parkings,
        )

    def _let_arrive(self) -> None:
        if not self._scheduler.has_work and self._arrivals:
            self._clock.advance(max(0.0, self._arrivals[0].arrival_s - self._clock()))
        while self._arrivals and self._arrivals[0].arrival_s <= self._clock():
            request = self._arrivals.pop(0)
            served = {tenant.name: tenant.served_s for tenant in self._scheduler._tenants.active.values()}
            try:
                self._scheduler.add(request)
            except RequestRefused as refusal:
                self._totals[f"refused: {refusal.reason}"] += 1
            else:
                self._ledger.accept(request)
                check(self._scheduler)
                check_entered(self._scheduler, request.tenant, served)

    def _maybe_abort(self) -> None:
        if not self._ledger.requests or self._rng.random() >= self._faults.aborts:
            return
        request = self._rng.choice(list(self._ledger.requests.values()))
        index = self._rng.choice((None, self._rng.randrange(request.num_choices + 1)))
        indices = range(request.num_choices) if index is None else [index]
        self._ledger.aborted.update((request.request_id, k) for k in indices)
        progress = self._scheduler.abort(request.request_id, index)
        assert all(news.finish is FinishReason.ABORT for news in progress), "an abort ended otherwise"
        self._receive(progress)

    def _receive(self, progress: Iterable[Progress]) -> None:
        for news in progress:
            choice = (news.request_id, news.index)
            if choice in self._ledger.finishes and news.finish is not None and self._totals["deaths"]:
                self._runner.forget(news.seq_id)
                continue  # it ended for its client before the engine died
            assert choice not in self._ledger.finishes, f"news of {choice} after its end"
            assert news.tokens or news.finish, "news without any"
            output = self._ledger.outputs[choice]
            output += news.tokens
            request = self._ledger.requests[news.request_id]
            expected, _ = true_output(request, news.index, MAX_MODEL_LEN)
            assert tuple(output) == expected[: len(output)], f"{choice} has lost, doubled or wrong tokens"
            if news.finish is not None:
                self._ledger.finishes[choice] = news.finish
                self._check_finish(news, request, tuple(output))
                self._runner.forget(news.seq_id)

    def _check_finish(self, news: Progress, request: Request, output: tuple[int, ...]) -> None:
        choice = (news.request_id, news.index)
        expected, natural = true_output(request, news.index, MAX_MODEL_LEN)
        if news.finish is FinishReason.ABORT:
            assert choice in self._ledger.aborted, f"{choice} was aborted by nobody"
        elif news.finish is FinishReason.DEADLINE:
            assert request.deadline_s is not None, f"{choice} has no deadline"
            assert request.deadline_s <= self._clock(), f"{choice} ended before its deadline"
        elif news.finish is FinishReason.ERROR:
            assert choice in self._failing, f"{choice} failed by itself: {news.error}"
        else:
            assert news.finish is natural, f"{choice} ended by {news.finish}, not {natural}"
            assert output == expected, f"{choice} ended after {len(output)} of {len(expected)} tokens"
            stop = expected[-1] if natural is FinishReason.STOP else None
            assert news.stop_token == stop, "a wrong stop token"
            self._check_prompt_logits(request, news.index)

    def _check_prompt_logits(self, request: Request, index: int) -> None:
        if index == 0 and request.sampling.prompt_logprobs is not None and not any(request.delivered):
            if self._totals["deaths"]:
                return  # a new engine reports them from the beginning; the client drops what it knows
            reported = self._prompt_logits.get((request.request_id, 0), [])
            assert reported == list(range(len(request.prompt_ids) - 1)), "prompt logits are not complete"

    def _check_ledger(self) -> None:
        missing = self._ledger.outputs.keys() - self._ledger.finishes.keys()
        assert not missing, f"{missing} never ended"
        assert self._runner.is_empty(), "the engine still knows a sequence"


def draw_spans(rng: random.Random) -> tuple[int, ...]:
    """By group of the model's layers; most models have one."""
    if rng.random() < 0.5:
        return (0,)
    num_whole = rng.choice((0, 1, 1, 2))
    return (0,) * num_whole + tuple(rng.choice((1, 2, 5, 8, 20)) for _ in range(rng.randint(1, 3)))


def draw_config(rng: random.Random, policy: str, spans: tuple[int, ...] = (0,)) -> SchedulerConfig:
    page_size = rng.choice((1, 2, 4, 8))
    max_num_batched_tokens = rng.choice((1, 3, 8, 16, 64))
    least = Spans(spans, page_size).most_pages(MAX_MODEL_LEN, max_num_batched_tokens)
    host_pages = rng.choice((0, least // 4, least // 2, least * 4))
    return SchedulerConfig(
        policy=policy,
        page_size=page_size,
        num_pages=rng.choice((max(1, least * 3 // 4), least, least * 3 // 2, least * 6)),
        host_pages=host_pages,
        disk_pages=rng.choice((0, least, least * 8)) if host_pages else 0,
        max_num_seqs=rng.choice((1, 2, 3, 8)),
        max_num_batched_tokens=max_num_batched_tokens,
        max_queued_requests=rng.choice((2, 100)),
        prefix_cache=rng.random() < 0.8,
        head_start_gamma=rng.choice((0.0, 0.3, 10.0)),
        max_head_start_s=rng.choice((0.05, 0.5, 10.0)),
        max_pause_s=rng.choice((0.0, 0.3, 100.0)),
        victims=rng.choice(VICTIMS),
        reserve_share=rng.choice((0.0, 0.1)),
        max_copies_in_flight=rng.choice((1, 4, 256)),
        growth_share=rng.choice((0.0, 1.0)),
        min_shared_tokens=rng.choice((1, 8)),
        tenant_weights=rng.choice(((), ("a=3",))),
        max_tenant_running=rng.choice((0, 0, 1, 2)),
        static_quantum_s=rng.choice((0.01, 0.03)),
        static_levels=rng.choice((1, 3, 6)),
        static_max_head_start_s=rng.choice((0.05, 0.5, 10.0)),
    )


def draw_costs(rng: random.Random) -> CostModel:
    return CostModel(
        step_s=rng.choice((0.0, 0.02)),
        slice_s=0.001,
        token_s=rng.choice((0.0001, 0.003)),
        pair_s=1e-6,
        host_page_s=rng.choice((0.0, 0.0, 1e-4, 0.1)),
        disk_page_s=rng.choice((0.0, 1e-4, 0.1)),
    )


def draw_faults(rng: random.Random) -> Faults:
    return Faults(
        aborts=rng.choice((0.0, 0.02, 0.1)),
        failing_copies=rng.choice((0.0, 0.3)),
        slow_copies=rng.choice((0.1, 0.8)),
        clock_jumps=rng.choice((0.0, 0.0, 0.02)),
        failing_steps=frozenset([rng.randint(1, 40)] if rng.random() < 0.1 else []),
        dying_steps=frozenset(rng.sample(range(1, 60), rng.choice((1, 3))) if rng.random() < 0.2 else []),
    )


def draw_requests(rng: random.Random, now_s: float) -> list[Request]:
    """Requests by arrival, of which many begin alike, and some come back to what was asked long before."""
    stems = [tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, _MAX_STEM))) for _ in range(2)]
    gap_s = rng.choice((0.001, 0.05, 0.5))
    requests = []
    for number in range(rng.randint(1, 14)):
        now_s += rng.expovariate(1.0 / gap_s)
        requests.append(draw_request(rng, number, now_s, rng.choice(stems)))
        stems.append(requests[-1].prompt_ids[:_MAX_STEM])
    return requests


def draw_request(rng: random.Random, number: int, now_s: float, stem: tuple[int, ...]) -> Request:
    sampling = SamplingParams(
        seed=rng.randrange(3),
        max_tokens=rng.choice((0, 1, 4, 12, 60)),
        min_tokens=rng.choice((0, 0, 3)),
        stop_token_ids=tuple(rng.sample(range(VOCABULARY), rng.choice((0, 1, 4)))),
        prompt_logprobs=rng.choice((None, None, None, 2)),
    )
    prompt = stem + tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 20)))
    request = Request(
        request_id=f"request-{number}",
        prompt_ids=prompt,
        sampling=sampling,
        num_choices=rng.choice((1, 1, 1, 2, 4)),
        arrival_s=now_s,
        deadline_s=now_s + rng.expovariate(0.5) if rng.random() < 0.15 else None,
        priority=rng.choice((0, 0, -1, 5)),
        tenant=rng.choice(("", "", "a", "b")),
        cache_salt=rng.choice(("", "", "other")),
        method=rng.choice(METHODS),
    )
    return _continued(rng, request) if rng.random() < 0.15 else request


def _continued(rng: random.Random, request: Request) -> Request:
    """The same request, as a new engine process gets it: a part of each choice was delivered."""
    delivered = []
    for index in range(rng.randint(0, request.num_choices)):
        output, _ = true_output(request, index, MAX_MODEL_LEN)
        delivered.append(output[: rng.randint(0, len(output))])
    return replace(request, delivered=tuple(delivered))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scheduler.simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="simulate seeds 0 .. SEEDS-1")
    parser.add_argument("--seed", type=int, help="simulate this seed alone, with a traceback")
    parser.add_argument("--policy", choices=POLICIES, help="instead of the one that the seed draws")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        print(Simulation(options.seed, options.policy).run())
        return 0
    for seed in range(options.seeds):
        try:
            Simulation(seed, options.policy).run()
        except Exception as error:
            policy = f" --policy {options.policy}" if options.policy else ""
            print(f"\nseed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
            print(f"replay: python -m scheduler.simulate --seed {seed}{policy}", file=sys.stderr)
            return 1
        if seed % 250 == 249 or seed + 1 == options.seeds:
            print(f"\r{seed + 1}/{options.seeds} seeds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
