"""Where a step's time goes with 32 sequences decoding: the Python side, phase by phase, and the arithmetic.

    python -m tests.bench.profile_step [--sequences 32] [--steps 200] [--speculative] [--cprofile]

The Python side is everything but the forward pass and the draw: guesses and what is learned of them, taking
the plan, building the arrays, decoding methods, applying, reporting, encoding the message. Times are wall
clock of one thread.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec

from engine import runner as runner_module
from engine.building import build_engine
from engine.config import EngineConfig
from engine.messages import Submit
from scheduler.config import SchedulerConfig
from scheduler.types import Request, SamplingParams

PROMPT_LEN = 128
ARITHMETIC = ("forward", "head", "sample")
PHASES = ("offer", "plan", "build", *ARITHMETIC, "learn", "apply", "stats", "rest", "encode", "python side")


class Laps:
    """Microseconds per phase and step, without those of phases within it."""

    def __init__(self) -> None:
        self.now: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self._within = 0.0  # of phases within the one that goes on

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            begun, beside = time.perf_counter(), self._within
            self._within = 0.0
            try:
                return function(*arguments, **named)
            finally:
                spent = (time.perf_counter() - begun) * 1e6
                self.now[name] += spent - self._within
                self._within = beside + spent

        return call

    def close_step(self) -> None:
        self.steps.append(dict(self.now))
        self.now.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--speculative", action="store_true", help="every sequence takes drafts")
    parser.add_argument("--cprofile", action="store_true")
    asked = parser.parse_args()
    scheduling = SchedulerConfig(max_num_seqs=asked.sequences, num_pages=8192)
    core = build_engine(EngineConfig(scheduler=scheduling)).core
    method = "speculative" if asked.speculative else "autoregressive"
    for number in range(asked.sequences):
        prompt = tuple((number * 7919 + place * 104729) % 49000 for place in range(PROMPT_LEN))
        sampling = SamplingParams(temperature=0.0, max_tokens=asked.steps + 64)
        request = Request(request_id=f"r{number}", prompt_ids=prompt, sampling=sampling, method=method)
        core.handle(Submit(request))
    while len(core.step().outputs) < asked.sequences:
        pass  # prompts are still being computed

    gc.collect()
    gc.freeze()  # as the engine process does
    laps = Laps()
    encode = laps.timed("encode", msgspec.msgpack.Encoder().encode)
    runner = core.runner
    runner.batches.build = laps.timed("build", runner.batches.build)  # type: ignore[method-assign]
    runner.model.compute = laps.timed("forward", runner.model.compute)  # type: ignore[method-assign]
    runner.model.logits = laps.timed("head", runner.model.logits)  # type: ignore[method-assign]
    runner_module.sample = laps.timed("sample", runner_module.sample)  # type: ignore[assignment]
    scheduler, speculation = core.scheduler, core.speculation
    speculation.offer = laps.timed("offer", speculation.offer)  # type: ignore[method-assign]
    speculation.learn = laps.timed("learn", speculation.learn)  # type: ignore[method-assign]
    scheduler.plan = laps.timed("plan", scheduler.plan)  # type: ignore[method-assign]
    scheduler.apply = laps.timed("apply", scheduler.apply)  # type: ignore[method-assign]
    scheduler.stats = laps.timed("stats", scheduler.stats)  # type: ignore[method-assign]
    step = laps.timed("rest", core.step)
    profile = cProfile.Profile()
    for _ in range(asked.steps):
        if asked.cprofile:
            profile.enable()
        encode(step())
        profile.disable()
        laps.close_step()
    report(laps)
    if asked.cprofile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def report(laps: Laps) -> None:
    for lap in laps.steps:
        lap["python side"] = sum(value for name, value in lap.items() if name not in ARITHMETIC)
    print(f"{'phase':<12} {'p50 us':>9} {'p99 us':>9} {'max us':>9}")
    for name in PHASES:
        values = sorted(lap.get(name, 0.0) for lap in laps.steps)
        p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
        print(f"{name:<12} {statistics.median(values):>9.0f} {p99:>9.0f} {values[-1]:>9.0f}")


if __name__ == "__main__":
    main()
