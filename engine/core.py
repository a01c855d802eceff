"""The step, on one screen: expire, plan, execute, apply, report."""

from __future__ import annotations

import logging
import time
from types import MappingProxyType
from typing import TYPE_CHECKING

from engine.bisection import Bisected, Fault, bisect
from engine.decoding import METHODS
from engine.drafting import AUTO, STORE_BYTES, light_drafters
from engine.drafting.costs import DraftCosts
from engine.drafting.speculation import Speculation
from engine.messages import Abort, SequenceOutput, StepOutput, Submit
from engine.runner import Outcome, Runner
from engine.step_times import StepTimes
from engine.tiers.rare_warnings import RareWarnings
from scheduler.plan import Advance, Progress, Slice, StepPlan
from scheduler.refusal import RefusalReason, RequestRefused
from scheduler.types import FinishReason, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from engine.drafting.guess import Drafter
    from engine.drafting.overlap import Overlap
    from engine.messages import Verified
    from engine.tiers.copier import Copier
    from scheduler.plan import Tier
    from scheduler.scheduler import Scheduler

logger = logging.getLogger("octavo.engine")

LONG_STEP_S = 1.0  # steps that are predicted to take longer are announced
MAX_FAILED_STEPS = 3  # in a row, of which nothing could be computed, before the engine must prove itself


class EngineCore:
    """A scheduler and a runner. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        vocab_size: int,
        copier: Copier | None = None,
        drafters: Mapping[str, Drafter] = MappingProxyType({}),
        overlap: Overlap | None = None,
        draft_store_bytes: int = STORE_BYTES,
    ) -> None:
        """`drafters`: those beside the light ones, by name. `overlap`: where they can draft ahead.
        `draft_store_bytes`: what the light ones may remember."""
        self.scheduler = scheduler
        self.runner = runner
        self.vocab_size = vocab_size
        self.copier = copier  # None: there is no tier below the device
        # Hears of requests before anything of them is computed.
        self.on_begun: Callable[[tuple[str, ...]], None] | None = None
        # Hears how long a step is predicted to take, before it begins, where that is long.
        self.on_long_step: Callable[[float], None] | None = None
        self._longest_step_s = _longest_step_s(scheduler)
        self.step_times = StepTimes(scheduler.costs)
        draft_costs = DraftCosts(scheduler.costs, runner.row_multiple)
        everyone = light_drafters(vocab_size, draft_store_bytes) | dict(drafters)
        self.speculation = Speculation(
            scheduler, draft_costs, everyone, vocab_size, runner.tree_block, overlap
        )
        runner.taps = self.speculation.taps
        self._early: list[SequenceOutput] = []  # what happened between steps
        self._failed_steps = 0
        self._warnings = RareWarnings()
        self._waits_for_copies = False

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._early)

    @property
    def can_step(self) -> bool:
        """Whether a step would bring anything now: everyone may be waiting for copies, and then the
        copier's file descriptor tells when to look again."""
        if self._waits_for_copies:
            assert self.copier is not None
            self._waits_for_copies = not self.copier.has_news and not self._early
        return self.has_work and not self._waits_for_copies

    def handle(self, message: Submit | Abort) -> None:
        """Take a request or an abort; what follows at once is part of the next report."""
        self._waits_for_copies = False
        if isinstance(message, Abort):
            self._collect(self.scheduler.abort(message.request_id, message.index, natural=message.natural))
            return
        request = message.request
        try:
            self._check(request)
            self.scheduler.add(request)
        except RequestRefused as refused:
            logger.info("refused request=%s reason=%s: %s", request.request_id, refused.reason, refused)
            self._early.extend(
                SequenceOutput(
                    request.request_id,
                    index,
                    finish=FinishReason.ERROR,
                    error=str(refused),
                    refused=True,
                    refusal=refused.reason,
                    retry_after_s=refused.retry_after_s,
                )
                for index in range(max(1, request.num_choices))
            )

    def step(self) -> StepOutput:
        """Compute one step, if there is anything to compute, and report all news since the last call."""
        failed_copies: tuple[Tier, ...] = ()
        if self.copier is not None:
            self.scheduler.copied(self.copier.finished())
            failed_copies = self.copier.take_failed()
        self._collect(self.scheduler.expire())
        self.speculation.offer()
        plan = self.scheduler.plan()
        self._set_aside(plan)
        if self.copier is not None:
            self.copier.start(plan.copies)
            self._waits_for_copies = not plan.slices and self.copier.num_in_flight > 0
        num_prompt_tokens = 0
        if plan.slices:
            num_prompt_tokens = sum(self._new_prompt_tokens(piece) for piece in plan.slices)
            self._announce(plan)
            outcomes = self._execute(plan)
            verified = self.speculation.learn(plan, outcomes)
            progress = self.scheduler.apply(plan, [outcome.advance for outcome in outcomes])
            self._collect(progress, outcomes, verified)
        outputs, self._early = tuple(self._early), []
        stats, ratio = self.scheduler.stats(), self.step_times.ratio
        return StepOutput(outputs, stats, num_prompt_tokens, failed_copies, ratio)

    def close(self) -> None:
        """Whatever still runs is dropped; content on its way to the disk is lost."""
        self.speculation.close()
        if self.copier is not None:
            self.copier.close()

    def _announce(self, plan: StepPlan) -> None:
        """If the process dies in this step, somebody must know who was in it for the first time."""
        sequences = [self.scheduler.sequence(piece.seq_id) for piece in plan.slices]
        begun = tuple({one.request.request_id for one in sequences if not one.num_reached})
        if begun and self.on_begun is not None:
            self.on_begun(begun)

    def _set_aside(self, plan: StepPlan) -> None:
        """Also under a plan that computes nothing, since it waits for copies: places are few."""
        for entry in plan.preempted:
            self.runner.set_aside(entry.seq_id)
            victim = self.scheduler.sequence(entry.seq_id)
            logger.debug(
                "preempted request=%s choice=%d level=%d tokens=%d short_of=%s for_request=%s",
                victim.request.request_id,
                victim.index,
                victim.level,
                victim.num_reached,
                entry.reason,
                self.scheduler.sequence(entry.for_seq_id).request.request_id,
            )

    def _new_prompt_tokens(self, piece: Slice) -> int:
        """Prompt tokens that the slice reaches first, those found in the cache before it included."""
        sequence = self.scheduler.sequence(piece.seq_id)
        end = min(piece.start + len(piece.tokens), sequence.prompt_len)
        return max(0, end - sequence.num_reached)

    def _execute(self, plan: StepPlan) -> tuple[Outcome, ...]:
        """Whoever raises, computed alone, ends with an error; everyone else goes on. Raises where the engine
        itself is at fault: then nobody is to blame, and all begin anew."""
        with self.speculation.ahead(plan):
            begun_s = time.perf_counter()
            found, first = bisected = bisect(plan, self._compute)
            seconds = time.perf_counter() - begun_s
        if first is None:
            self.step_times.note(plan, seconds)
            self.speculation.costs.note(plan, seconds)
        else:
            self._note_faults(plan, bisected, seconds)
        self._failed_steps = self._failed_steps + 1 if bisected.is_lost else 0
        if self._failed_steps >= MAX_FAILED_STEPS:
            self.runner.prove()
            self._failed_steps = 0
        pieces = zip(plan.slices, found, strict=True)
        return tuple(self._blamed(piece, one) if isinstance(one, Fault) else one for piece, one in pieces)

    def _compute(self, plan: StepPlan) -> tuple[Outcome, ...]:
        """Where it takes long, say how long the silence may last."""
        slower = max(1.0, self.step_times.ratio)
        if self.on_long_step is not None and slower * self._longest_step_s >= LONG_STEP_S:
            costs = self.scheduler.costs
            predicted_s = slower * costs.step((piece.start, len(piece.tokens)) for piece in plan.slices)
            if predicted_s >= LONG_STEP_S:
                self.on_long_step(predicted_s)
        return self.runner.execute(plan)

    def _note_faults(self, plan: StepPlan, bisected: Bisected, seconds: float) -> None:
        """In the log. Raises where the device is lost."""
        assert bisected.first is not None
        if bisected.is_lost:
            self.runner.check_device()
        culprits = [
            self.scheduler.sequence(piece.seq_id)
            for piece, one in zip(plan.slices, bisected.found, strict=True)
            if isinstance(one, Fault)
        ]
        if culprits:
            names = ", ".join(f"request={one.request.request_id} choice={one.index}" for one in culprits)
            logger.error("step %d failed by %s: %s", plan.step, names, bisected.first.report)
            return
        self._warnings.warn(
            bisected.first.cause,
            "step %d of %d tokens was computed in parts, in %.2f s, as it raised %s: where memory is what it "
            "lacks, lower max_num_batched_tokens or kv_cache_bytes",
            plan.step,
            plan.num_tokens,
            seconds,
            bisected.first.cause,
        )

    def _blamed(self, piece: Slice, fault: Fault) -> Outcome:
        """Guesses may be the cause, where plain decoding never comes: then it is computed without them."""
        guesses = bool(piece.num_window) and self.scheduler.sequence(piece.seq_id).window.optional
        try:
            self.runner.spoil([piece] if guesses else [])
        except Exception:
            logger.exception("what a slice has written cannot be cleared")
        else:
            if guesses:
                return Outcome(Advance(piece.seq_id, (), 0, spoiled=True))
        cause = f"the engine could not compute this step: {fault.cause}"
        return Outcome(Advance(piece.seq_id, (), 0, error=cause))

    def _collect(
        self,
        progress: Iterable[Progress],
        outcomes: Iterable[Outcome] = (),
        verified: Mapping[int, tuple[Verified, ...]] = MappingProxyType({}),
    ) -> None:
        by_sequence = {outcome.advance.seq_id: outcome for outcome in outcomes}
        for news in progress:
            outcome, drafts = by_sequence.pop(news.seq_id, None), verified.get(news.seq_id, ())
            self._early.append(_output(news, outcome, drafts))
            if news.finish is not None:
                self.runner.release(news.seq_id)
                self.speculation.release(news.seq_id)
        for outcome in by_sequence.values():
            if outcome.prompt_logprobs:  # a chunk in the middle of a prompt has no other news
                sequence = self.scheduler.sequence(outcome.advance.seq_id)
                self._early.append(
                    SequenceOutput(
                        sequence.request.request_id, sequence.index, prompt_logprobs=outcome.prompt_logprobs
                    )
                )

    def _check(self, request: Request) -> None:
        """The server has validated all this; a wrong id here would corrupt or crash a batch."""
        sampling = request.sampling
        ids = [
            *request.prompt_ids,
            *(token for token, _ in sampling.logit_bias),
            *sampling.stop_token_ids,
            *(sampling.allowed_token_ids or ()),
            *(token for word in sampling.bad_words for token in word),
        ]
        wrong = None
        if not all(sampling.bad_words) or min(sampling.logprobs or 0, sampling.prompt_logprobs or 0) < 0:
            wrong = "bad_words holds an empty word, or a number of logprobs is negative"
        elif ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = f"a token id lies outside the vocabulary of {self.vocab_size}"
        elif request.method not in METHODS:
            wrong = f"unknown decoding method {request.method!r}"
        elif request.drafter not in (AUTO, *self.speculation.drafters):
            wrong = f"no drafter {request.drafter!r} is loaded"
        if wrong:
            raise RequestRefused(RefusalReason.INVALID, wrong)


def _longest_step_s(scheduler: Scheduler) -> float:
    """As the costs predict the longest of all: as many tokens as there may be, all far into long
    sequences."""
    tokens, seqs = scheduler.config.max_num_batched_tokens, scheduler.config.max_num_seqs
    start = max(0, scheduler.max_model_len - 1)
    return scheduler.costs.step([(start, tokens), *[(start, 1)] * (seqs - 1)])


def _output(news: Progress, outcome: Outcome | None, verified: tuple[Verified, ...]) -> SequenceOutput:
    logprobs = None
    if outcome is not None and outcome.logprobs is not None:
        logprobs = outcome.logprobs[: len(news.tokens)]
    return SequenceOutput(
        request_id=news.request_id,
        index=news.index,
        tokens=news.tokens,
        finish=news.finish,
        stop_token=news.stop_token,
        error=news.error,
        refused=outcome is not None and outcome.refused,
        logprobs=logprobs,
        prompt_logprobs=outcome.prompt_logprobs if outcome is not None else None,
        num_cached=news.num_cached,
        first_scheduled_s=news.first_scheduled_s,
        verified=verified,
    )
