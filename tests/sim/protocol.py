"""Seeded simulations of the protocol between server and engine: `python -m tests.sim.protocol --seeds 1000`.

Real are the messages and their encoding, the client's journal, and the engine's core with its scheduler;
fake are the runner, the copies and the wire. One seed makes one small world: requests arrive, are refused,
aborted and replayed, steps and copies fail, the engine is killed with messages on the wire in both
directions, or dies of a request that kills it, and a new one gets what the journal gives it. At the end every
accepted choice must have had exactly one end and its exact text, but for those of requests that kill engines,
and nothing may be left in the journal, the core or the scheduler.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast
from unittest.mock import patch

import msgspec

from engine.core import MAX_FAILED_STEPS, EngineCore
from engine.decoding import METHODS
from engine.journal import Journal
from engine.messages import Abort, FromEngine, SequenceOutput, StepOutput, Submit, ToEngine, TokenLogprobs
from engine.runner import Outcome
from scheduler.clock import ManualClock
from scheduler.config import POLICIES
from scheduler.fake_runner import METHODS as FAKE_METHODS
from scheduler.fake_runner import VOCABULARY, FakeRunner, true_output
from scheduler.fake_tiers import FakeTiers
from scheduler.invariants import check, check_empty
from scheduler.plan import Tier
from scheduler.refusal import RefusalReason
from scheduler.scheduler import Scheduler
from scheduler.simulate import MAX_MODEL_LEN, draw_config, draw_costs, draw_requests, draw_spans
from scheduler.types import FinishReason, Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from engine.runner import Runner
    from engine.tiers.copier import Copier
    from scheduler.plan import Copied, Copy, Slice, StepPlan

Choice = tuple[str, int]

_LOAD = (RefusalReason.QUEUE_FULL, RefusalReason.DEADLINE)
_MAX_IDLE_ROUNDS = 200  # in which nothing is computed nor copied


class _Crash(BaseException):
    """The process is gone: nothing in it can catch this."""


class _Wire:
    """One direction of the socket: bytes in order, of which the last are lost when an engine dies."""

    def __init__(self) -> None:
        self._bytes: deque[bytes] = deque()
        self._encoder = msgspec.msgpack.Encoder()

    def __len__(self) -> int:
        return len(self._bytes)

    def send(self, message: ToEngine | FromEngine) -> None:
        self._bytes.append(self._encoder.encode(message))

    def receive(self) -> bytes:
        return self._bytes.popleft()

    def lose(self) -> None:
        self._bytes.clear()


class _Copies:
    """The copier's face, on fake tiers. News is drawn when it is asked for, as a thread would bring it."""

    def __init__(self, tiers: FakeTiers) -> None:
        self._tiers = tiers
        self._ended: list[Copied] = []

    def start(self, copies: tuple[Copy, ...]) -> None:
        self._tiers.start(copies)

    @property
    def num_in_flight(self) -> int:
        return self._tiers.num_under_way + len(self._ended)

    @property
    def has_news(self) -> bool:
        self._ended += self._tiers.finished()
        return bool(self._ended)

    def finished(self) -> tuple[Copied, ...]:
        ended, self._ended = (*self._ended, *self._tiers.finished()), []
        return ended

    def take_failed(self) -> tuple[Tier, ...]:
        return ()  # they are only counted

    def close(self) -> None:
        pass


class _Computing:
    """The runner's face, on a fake runner that knows every text; some steps raise."""

    row_multiple = 8
    tree_block = 128
    taps: tuple[int, ...] = ()

    def __init__(self, world: Protocol, fake: FakeRunner, scheduler: Scheduler) -> None:
        self._world = world
        self._fake = fake
        self._scheduler = scheduler
        self._tables: set[int] = set()  # sequences with a page table: no more than there are places

    def set_aside(self, seq_id: int) -> None:
        self._fake.forget(seq_id)
        self._tables.discard(seq_id)

    def release(self, seq_id: int) -> None:
        self._fake.forget(seq_id)
        self._tables.discard(seq_id)

    def spoil(self, pieces: Sequence[Slice]) -> None:
        assert not pieces, "nobody offers drafts here"

    def check_device(self) -> None:
        pass

    def execute(self, plan: StepPlan) -> tuple[Outcome, ...]:
        for piece in plan.slices:
            sequence = self._scheduler.sequence(piece.seq_id)
            if self._world.kills(sequence.request, len(sequence.tokens) - sequence.prompt_len):
                raise _Crash
        if self._world.step_fails():
            if len(plan.slices) == 1:
                sequence = self._scheduler.sequence(plan.slices[0].seq_id)
                self._world.failed.add((sequence.request.request_id, sequence.index))
            raise RuntimeError("injected")
        slices = {piece.seq_id: piece for piece in plan.slices}
        try:
            self._tables.update(slices)
            assert len(self._tables) <= self._scheduler.config.max_num_seqs, "more page tables than places"
            advances = self._fake.execute(plan)
        except Exception as error:  # the core goes on after a failed step: the world does not
            self._world.complaint = error
            raise
        return tuple(
            Outcome(advance, prompt_logprobs=self._scores(slices[advance.seq_id])) for advance in advances
        )

    def _scores(self, piece: Slice) -> tuple[TokenLogprobs, ...] | None:
        """The place instead of a log-probability: so that a lost or doubled one is noticed."""
        sequence = self._scheduler.sequence(piece.seq_id)
        if sequence.index or sequence.request.sampling.prompt_logprobs is None:
            return None
        end = piece.start + len(piece.tokens)
        slots = range(end - piece.num_logits, min(end, sequence.prompt_len - 1))
        return tuple(TokenLogprobs(sequence.tokens[slot + 1], float(slot), 1, ()) for slot in slots) or None


@dataclass(slots=True)
class _Told:
    """What one choice of a client has heard."""

    tokens: list[int]
    scores: list[float]
    finish: FinishReason | None = None
    error: str | None = None


class Protocol:
    """One world: a client with a journal, two wires, and one engine after the other."""

    def __init__(self, seed: int) -> None:
        self._rng = rng = random.Random(seed)
        self._clock = ManualClock(rng.uniform(0.0, 100.0))
        self._spans = draw_spans(rng)
        self._config = draw_config(rng, rng.choice(POLICIES), self._spans)
        self._costs = draw_costs(rng)
        self._failing_copies = rng.choice((0.0, 0.3))
        self._slow_copies = rng.choice((0.1, 0.8))
        self._abort_rate = rng.choice((0.0, 0.05))
        # An engine that hardly ever lives until a prompt is computed would bring no world to its end.
        self._death_rate = min(rng.choice((0.0, 0.02, 0.1)), self._config.max_num_batched_tokens / 50)
        self._failing_step_rate = rng.choice((0.0, 0.0, 0.02))
        self._delay = rng.choice((0.0, 0.5))  # chance that a message stays on the wire for a round
        self._arrivals = [replace(one, delivered=()) for one in draw_requests(rng, self._clock())]
        poison_rate = rng.choice((0.0, 0.0, 0.15))
        # Requests that kill the engine once so many of a choice's tokens are there.
        self._poison = {
            one.request_id: rng.choice((0, 0, 2)) for one in self._arrivals if rng.random() < poison_rate
        }
        self._failed_in_a_row = 0
        self.complaint: Exception | None = None  # of the fake runner, about a plan
        self.failed: set[Choice] = set()  # that raised alone
        self._aborted: set[Choice] = set()
        self._requests: dict[str, Request] = {}
        self._num_given: Counter[str] = Counter()  # engines that were given a request
        self._given: set[str] = set()  # to the one that runs
        self._told: dict[Choice, _Told] = {}
        self._journal = Journal()
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._reader: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self.totals: Counter[str] = Counter()
        self._start_engine({}, {})

    def _start_engine(self, disk_index: dict[bytes, int], disk: dict[tuple[Tier, int], list[int]]) -> None:
        """As `build_engine` does: without a prefix cache nothing is found that another process left."""
        config = self._config
        disk_index = disk_index if config.prefix_cache else {}
        self._to_engine, self._from_engine = _Wire(), _Wire()
        scheduler = Scheduler(
            config, self._clock, MAX_MODEL_LEN, self._costs, disk_index=disk_index, spans=self._spans
        )
        self._tiers = FakeTiers(
            self._rng, config.num_pages, config.page_size, self._failing_copies, self._slow_copies
        )
        self._tiers.pages.update(disk)
        self._fake = FakeRunner(scheduler, self._rng, set(), self._tiers)
        copies = cast("Copier", _Copies(self._tiers)) if config.host_pages else None
        runner = cast("Runner", _Computing(self, self._fake, scheduler))
        self._core = EngineCore(scheduler, runner, VOCABULARY, copies)
        self._core.on_begun = self._journal.begun
        self._given.clear()
        self._send(self._journal.resume())

    # The world's time

    def run(self) -> Counter[str]:
        """Run to the end -> how often what happened. Raises AssertionError when anything is wrong."""
        logger = logging.getLogger("octavo.engine")
        known = patch.dict(METHODS, dict.fromkeys(FAKE_METHODS, METHODS["autoregressive"]))
        with known, patch.object(logger, "disabled", new=True):  # what fails here fails on purpose
            self._run()
        return self.totals

    def _run(self) -> None:
        idle = 0
        while self._arrivals or self._journal or self._core.has_work or len(self._to_engine):
            before = self.totals["steps"]
            self._round()
            idle = 0 if self.totals["steps"] > before else idle + 1
            assert idle < _MAX_IDLE_ROUNDS, "nothing moves any more"
            assert self.totals["steps"] < 20_000, "no end: a livelock"
        while len(self._from_engine):
            self._client_hears()
        self._check_end()

    def _round(self) -> None:
        self._clock.advance(self._rng.expovariate(20.0))
        self._client_sends()
        self._engine_turns()
        while len(self._from_engine) and self._rng.random() >= self._delay:
            self._client_hears()
        if self._rng.random() < self._death_rate:
            self._die(outside=True)

    def kills(self, request: Request, num_tokens: int) -> bool:
        """Whether an engine dies that computes something of it after so many tokens of output."""
        return num_tokens >= self._poison.get(request.request_id, num_tokens + 1)

    def step_fails(self) -> bool:
        """Never so many in a row that the engine gives up, which is tested elsewhere."""
        fails = self._rng.random() < self._failing_step_rate and self._failed_in_a_row < MAX_FAILED_STEPS - 1
        self._failed_in_a_row = self._failed_in_a_row + 1 if fails else 0
        self.totals["failed steps"] += fails
        return fails

    # The client

    def _client_sends(self) -> None:
        if not self._journal and self._arrivals:
            self._clock.advance(max(0.0, self._arrivals[0].arrival_s - self._clock()))
        while self._arrivals and self._arrivals[0].arrival_s <= self._clock():
            request = self._arrivals.pop(0)
            self._requests[request.request_id] = request
            for index in range(request.num_choices):
                self._told[request.request_id, index] = _Told([], [])
            self._send(self._journal.add(request, self._deliver))
        if self._journal and self._rng.random() < self._abort_rate:
            self._client_aborts(self._rng.choice(list(self._journal.entries)))

    def _send(self, messages: Iterable[Submit | Abort]) -> None:
        for message in messages:
            if isinstance(message, Submit):
                assert message.request.request_id not in self._given, "an engine is given a request twice"
                self._given.add(message.request.request_id)
                self._num_given[message.request.request_id] += 1
            self._to_engine.send(message)

    def _client_aborts(self, request_id: str) -> None:
        """As the client does: of a whole request it wants to hear no more."""
        entry = self._journal.entries[request_id]
        index = self._rng.choice((None, self._rng.randrange(entry.request.num_choices)))
        self.totals["aborts"] += 1
        indices = range(entry.request.num_choices) if index is None else (index,)
        self._aborted.update((request_id, one) for one in indices)
        self._send(self._journal.abort(Abort(request_id, index)))

    def _client_hears(self) -> None:
        message = self._reader.decode(self._from_engine.receive())
        assert isinstance(message, StepOutput)
        for output in message.outputs:
            news, sink, messages = self._journal.record(output)
            self._send(messages)
            if news is not None and sink is not None:
                sink(news)

    def _deliver(self, news: SequenceOutput) -> None:
        choice = (news.request_id, news.index)
        told, request = self._told[choice], self._requests[news.request_id]
        assert told.finish is None, f"news of {choice} after its end"
        told.tokens += news.tokens
        told.scores += [score.logprob for score in news.prompt_logprobs or ()]
        expected, _ = true_output(request, news.index, MAX_MODEL_LEN)
        assert tuple(told.tokens) == expected[: len(told.tokens)], f"{choice}: lost, doubled or wrong tokens"
        assert told.scores == [float(place) for place in range(len(told.scores))], f"{choice}: wrong scores"
        if news.finish is not None:
            told.finish, told.error = news.finish, news.error
            self._check_finish(choice, news)

    def _check_finish(self, choice: Choice, news: SequenceOutput) -> None:
        request, told = self._requests[choice[0]], self._told[choice]
        expected, natural = true_output(request, choice[1], MAX_MODEL_LEN)
        self.totals[str(news.finish)] += 1
        if news.refusal is not None:
            self.totals[f"refused: {news.refusal}"] += 1
            load = news.refusal in _LOAD
            assert not (load and self._num_given[choice[0]] > 1), (
                f"{choice} was accepted, and refused for load"
            )
        elif news.finish is FinishReason.ABORT:
            assert choice in self._aborted, f"{choice} was aborted by nobody"
        elif news.finish is FinishReason.DEADLINE:
            assert request.deadline_s is not None, f"{choice} has no deadline"
            assert request.deadline_s <= self._clock(), f"{choice} ended before its deadline"
        elif news.finish is FinishReason.ERROR:
            assert choice in self.failed, f"{choice} failed by itself: {news.error}"
        else:
            assert news.finish is natural, f"{choice} ended by {news.finish}, not {natural}"
            assert tuple(told.tokens) == expected, f"{choice} ended after {len(told.tokens)} tokens"
            if choice[1] == 0 and request.sampling.prompt_logprobs is not None:
                assert len(told.scores) == len(request.prompt_ids) - 1, f"{choice}: scores are missing"

    # The engine

    def _engine_turns(self) -> None:
        """One turn of the process's loop; it sleeps where `can_step` is False and nothing has arrived."""
        while len(self._to_engine) and self._rng.random() >= self._delay:
            message = self._decoder.decode(self._to_engine.receive())
            assert isinstance(message, Submit | Abort)
            self._core.handle(message)
            check(self._core.scheduler)
        if not self._delay:  # nothing is on the wire
            for piece in self._core.scheduler._sequences.values():
                choice = (piece.request.request_id, piece.index)
                assert self._told[choice].finish is None, f"{choice} ended for its client, and is computed"
        if self._core.can_step:
            try:
                self._from_engine.send(self._core.step())
            except _Crash:
                self._die(outside=False)
                return
            if self.complaint is not None:
                raise self.complaint
            self.totals["steps"] += 1
            check(self._core.scheduler)

    def _die(self, *, outside: bool) -> None:
        """What the engine has not received, and what the client has not, is lost; but for a part of the
        latter, which comes through the socket after the death."""
        for _ in range(self._rng.randint(0, len(self._from_engine))):
            self._client_hears()
        self.totals["deaths" if outside else "crashes"] += 1
        self.totals["lost outputs"] += len(self._from_engine)
        self._count_engine()
        advanced = self._journal.advanced
        verdict, culprit = self._journal.lost(outside=outside)
        assert outside or advanced or verdict.is_closer, "a crash, and nobody is nearer to its cause"
        if culprit is not None:
            name = culprit.request.request_id
            assert name in self._poison, f"{name} is blamed, and kills nobody"
            assert self._given == {name}, f"{name} is blamed, and was not alone"
            self.totals["culprits"] += 1
            self._aborted.update((name, index) for index in culprit.live)  # no more is heard of them
        self._start_engine(dict(self._core.scheduler._tiers.disk.page_of), self._tiers.disk())

    def _count_engine(self) -> None:
        stats = self._core.scheduler.stats()
        self.totals.update(preemptions=stats.num_preemptions, fetched=stats.num_pages_up)

    # The end

    def _check_end(self) -> None:
        missing = {choice for choice, told in self._told.items() if told.finish is None} - self._aborted
        assert not missing, f"{missing} never ended"
        assert not self._journal, "the journal still knows a request"
        assert not self._core.has_work, "the core still has work"
        check_empty(self._core.scheduler)
        assert self._fake.is_empty(), "the runner still knows a sequence"
        self._count_engine()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.protocol", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="simulate seeds 0 .. SEEDS-1")
    parser.add_argument("--seed", type=int, help="simulate this seed alone, with a traceback")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        print(dict(Protocol(options.seed).run()))
        return 0
    for seed in range(options.seeds):
        try:
            Protocol(seed).run()
        except Exception as error:
            print(f"\nseed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
            print(f"replay: python -m tests.sim.protocol --seed {seed}", file=sys.stderr)
            return 1
        if seed % 250 == 249 or seed + 1 == options.seeds:
            print(f"\r{seed + 1}/{options.seeds} seeds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
