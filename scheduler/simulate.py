"""Seeded simulations of whole workloads: `python -m scheduler.simulate --seeds 10000`.

One seed makes one small world: a configuration (often too few pages, places or tokens), requests
that share prefixes, arrive, fail, expire and are aborted at random, and a runner that commits 0..n
tokens a step. After every step the checker recomputes all invariants. At the end every accepted
choice must have had its exact text and one end, and nothing may be left anywhere.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from scheduler.clock import ManualClock
from scheduler.config import POLICIES, SchedulerConfig
from scheduler.fake_runner import METHODS, VOCABULARY, FakeRunner, true_output
from scheduler.invariants import check, check_decisions, check_empty
from scheduler.refusal import RequestRefused
from scheduler.scheduler import Scheduler
from scheduler.types import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scheduler.plan import Progress

MAX_MODEL_LEN = 48


@dataclass(frozen=True, slots=True)
class Report:
    """What one simulation went through."""

    num_steps: int
    num_preemptions: int
    hit_tokens: int
    recomputed_tokens: int
    finishes: frozenset[FinishReason]
    num_refused: int


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
        self._config = draw_config(self._rng, policy or drawn)
        self._scheduler = Scheduler(self._config, self._clock, MAX_MODEL_LEN)
        self._failing: set[tuple[str, int]] = set()
        self._runner = FakeRunner(self._scheduler, self._rng, self._failing)
        self._ledger = _Ledger()
        self._arrivals = draw_requests(self._rng, self._clock())
        self._abort_chance = self._rng.choice((0.0, 0.02, 0.1))
        self._num_refused = 0
        for request in self._arrivals:
            if self._rng.random() < 0.05:
                self._failing.add((request.request_id, self._rng.randrange(request.num_choices)))

    def run(self) -> Report:
        """Run to the end. Raises AssertionError when anything is not as it must be."""
        choices = sum(request.num_choices for request in self._arrivals)
        max_steps = 200 + 40 * choices * MAX_MODEL_LEN
        num_steps = 0
        while self._arrivals or self._scheduler.has_work:
            self._step()
            num_steps += 1
            assert num_steps <= max_steps, f"no end after {num_steps} steps: a livelock"
        check_empty(self._scheduler)
        self._check_ledger()
        stats = self._scheduler.stats()
        return Report(
            num_steps=num_steps,
            num_preemptions=stats.num_preemptions,
            hit_tokens=stats.prefix_hit_tokens,
            recomputed_tokens=stats.recomputed_tokens,
            finishes=frozenset(self._ledger.finishes.values()),
            num_refused=self._num_refused,
        )

    def _step(self) -> None:
        scheduler = self._scheduler
        self._clock.advance(self._rng.expovariate(20.0))
        self._let_arrive()
        self._maybe_abort()
        self._receive(scheduler.expire())
        running = set(scheduler._places.running)
        waiting = {piece.seq_id for _, piece in scheduler._places.waiting.entries()}
        plan = scheduler.plan()
        assert plan.slices or not scheduler._sequences, "sequences are alive, and none computes"
        check_decisions(scheduler, plan, running, waiting)
        advances = self._runner.execute(plan)
        self._maybe_abort()
        self._receive(scheduler.apply(plan, advances))
        check(scheduler)

    def _let_arrive(self) -> None:
        if not self._scheduler.has_work and self._arrivals:
            self._clock.advance(max(0.0, self._arrivals[0].arrival_s - self._clock()))
        while self._arrivals and self._arrivals[0].arrival_s <= self._clock():
            request = self._arrivals.pop(0)
            try:
                self._scheduler.add(request)
            except RequestRefused:
                self._num_refused += 1
            else:
                self._ledger.accept(request)
                check(self._scheduler)

    def _maybe_abort(self) -> None:
        if not self._ledger.requests or self._rng.random() >= self._abort_chance:
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
            reported = self._runner.prompt_logits.get((request.request_id, 0), [])
            assert reported == list(range(len(request.prompt_ids) - 1)), "prompt logits are not complete"

    def _check_ledger(self) -> None:
        missing = self._ledger.outputs.keys() - self._ledger.finishes.keys()
        assert not missing, f"{missing} never ended"
        assert self._runner.is_empty(), "the engine still knows a sequence"


def draw_config(rng: random.Random, policy: str) -> SchedulerConfig:
    page_size = rng.choice((1, 2, 4, 8))
    least = -(-MAX_MODEL_LEN // page_size)
    return SchedulerConfig(
        policy=policy,
        page_size=page_size,
        num_pages=rng.choice((least * 3 // 4, least, least * 3 // 2, least * 6)),
        max_num_seqs=rng.choice((1, 2, 3, 8)),
        max_num_batched_tokens=rng.choice((1, 3, 8, 16, 64)),
        max_queued_requests=rng.choice((2, 100)),
        prefix_cache=rng.random() < 0.8,
        mlfq_quantum_s=rng.choice((0.01, 0.03)),
        mlfq_levels=rng.choice((1, 3, 6)),
        mlfq_max_head_start_s=rng.choice((0.05, 0.5, 10.0)),
    )


def draw_requests(rng: random.Random, now_s: float) -> list[Request]:
    """Requests by arrival, of which many begin alike."""
    stems = [tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 24))) for _ in range(2)]
    gap_s = rng.choice((0.001, 0.05, 0.5))
    requests = []
    for number in range(rng.randint(1, 14)):
        now_s += rng.expovariate(1.0 / gap_s)
        requests.append(draw_request(rng, number, now_s, rng.choice(stems)))
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
        if seed % 50 == 49 or seed + 1 == options.seeds:
            print(f"\r{seed + 1}/{options.seeds} seeds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
