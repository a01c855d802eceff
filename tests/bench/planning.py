"""How long a step takes to plan and to apply, with a long queue and many running sequences.

    python -m tests.bench.planning [--policy mlfq] [--queued 10000] [--running 256] [--steps 2000]
                                   [--pressure] [--spans 0 512 512] [--host] [--cprofile]

The workload goes on as in service: mostly decodes, a few prompts in chunks, a request ends and another one
arrives every few steps, from 100 tenants, one request in four with a prefix that others share. Without
`--pressure` the running sequences fit the pages; with it they outgrow them. Times are those of the thread on
its core, in microseconds, so that a busy neighbour does not count; the garbage collector is set as in the
engine process.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import random
import time

from engine.process import GC_THRESHOLD
from scheduler.clock import ManualClock
from scheduler.config import POLICIES, SchedulerConfig
from scheduler.costs import CostModel
from scheduler.plan import Advance, Copied, Slice
from scheduler.scheduler import Scheduler
from scheduler.types import FinishReason, Request, SamplingParams

NUM_TENANTS = 100
PAGE_SIZE = 16
MAX_MODEL_LEN = 8192
STEP_S = 0.02
COSTS = CostModel(step_s=0.006, slice_s=3e-5, token_s=2.5e-5, pair_s=0.0)
STOP = 1


class Workload:
    """Requests with prompts around 400 tokens and outputs around 250, and what an engine would answer."""

    def __init__(self, scheduler: Scheduler, clock: ManualClock, rng: random.Random) -> None:
        self.scheduler, self.clock, self.rng = scheduler, clock, rng
        self.num_live = 0
        self._num_added = 0
        self._stems = [tuple(rng.randrange(9, 50_000) for _ in range(256)) for _ in range(20)]

    def add(self) -> None:
        rng = self.rng
        length = min(6000, int(rng.lognormvariate(5.5, 1.0)) + 8)
        stem = rng.choice(self._stems) if rng.random() < 0.25 else ()
        self._num_added += 1
        self.num_live += 1
        self.scheduler.add(
            Request(
                request_id=str(self._num_added),
                prompt_ids=stem + tuple(rng.randrange(9, 50_000) for _ in range(length)),
                sampling=SamplingParams(max_tokens=1000, stop_token_ids=(STOP,)),
                arrival_s=self.clock(),
                tenant=str(rng.randrange(NUM_TENANTS)),
                priority=rng.randrange(4),
            )
        )

    def answer(self, piece: Slice) -> Advance:
        if not piece.num_logits:
            return Advance(piece.seq_id, (), len(piece.tokens))
        token = STOP if self.rng.random() < 1 / 250 else 10
        return Advance(piece.seq_id, (token,), len(piece.tokens))


def run(options: argparse.Namespace) -> dict[str, list[float]]:
    rng, clock = random.Random(0), ManualClock()
    config = SchedulerConfig(
        policy=options.policy,
        page_size=PAGE_SIZE,
        num_pages=options.running * (30 if options.pressure else 80) * len(options.spans),
        host_pages=options.running * 200 if options.host else 0,
        max_num_seqs=options.running,
        max_num_batched_tokens=2048,
        max_queued_requests=10 * options.queued,
    )
    scheduler = Scheduler(config, clock, MAX_MODEL_LEN, COSTS, spans=tuple(options.spans))
    work = Workload(scheduler, clock, rng)
    for _ in range(options.queued + options.running):
        work.add()
        clock.advance(1e-3)
    warm = 300
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    times: dict[str, list[float]] = {"plan": [], "apply": [], "plan + apply": []}
    profile = cProfile.Profile()
    landed: list[Copied] = []
    for number in range(warm + options.steps):
        clock.advance(STEP_S)
        while work.num_live < options.queued + options.running:
            work.add()
        scheduler.copied(landed)
        scheduler.expire()
        if options.cprofile and number >= warm:
            profile.enable()
        begun = time.thread_time()
        plan = scheduler.plan()
        planned = time.thread_time()
        profile.disable()
        landed = [Copied(copy.number) for copy in plan.copies]
        advances = [work.answer(piece) for piece in plan.slices]
        computed = time.thread_time()
        progress = scheduler.apply(plan, advances)
        applied = time.thread_time()
        work.num_live -= sum(news.finish is not None for news in progress)
        assert all(news.finish is not FinishReason.ERROR for news in progress)
        if number >= warm:
            times["plan"].append((planned - begun) * 1e6)
            times["apply"].append((applied - computed) * 1e6)
            times["plan + apply"].append((planned - begun + applied - computed) * 1e6)
    stats = scheduler.stats()
    print(
        f"{options.policy}: {stats.num_running} run, {stats.num_waiting} wait, {len(plan.slices)} slices; "
        f"{stats.num_preemptions} preemptions, {stats.num_parked} parked, {stats.num_overdue} overdue, "
        f"{stats.num_pages_up} pages up, {stats.recomputed_tokens} tokens computed again"
    )
    if options.cprofile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", choices=POLICIES, default="mlfq")
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pressure", action="store_true", help="too few pages")
    parser.add_argument(
        "--spans", type=int, nargs="+", default=[0], help="of groups of layers; 0 = no window"
    )
    parser.add_argument("--host", action="store_true", help="with pages in host memory")
    parser.add_argument("--cprofile", action="store_true", help="of plan()")
    times = run(parser.parse_args())
    print(f"{'microseconds':<14} {'p50':>8} {'p99':>8} {'max':>8}")
    for name, values in times.items():
        values.sort()
        p50, p99 = values[len(values) // 2], values[int(len(values) * 0.99)]
        print(f"{name:<14} {p50:>8.0f} {p99:>8.0f} {values[-1]:>8.0f}")


if __name__ == "__main__":
    main()
