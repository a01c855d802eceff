"""Between two steps: drafts for every sequence that wants them, as many as pay.

    drafters guess -> chances by what was accepted before -> the scheduler grants -> windows

and after the step, what was accepted teaches the chances, and the step's time the cost of a draft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from engine.drafting import AUTO, DRAFTERS
from engine.drafting.acceptance import Acceptance
from engine.drafting.guess import NO_GUESS, Guess
from engine.messages import Verified
from scheduler.speculation import Candidate, grant, may_pay
from scheduler.types import Window

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.drafting.costs import DraftCosts
    from engine.drafting.guess import Drafter
    from engine.runner import Outcome
    from scheduler.plan import StepPlan
    from scheduler.scheduler import Scheduler
    from scheduler.types import Sequence

METHOD = "speculative"
MAX_LINE = 24  # drafts for one sequence in one step


class Offer(NamedTuple):
    """What was offered to the scheduler for one sequence, and has not come back yet."""

    drafter: str
    evidence: int
    tokens: tuple[int, ...]


class Speculation:
    def __init__(self, scheduler: Scheduler, costs: DraftCosts, vocab_size: int) -> None:
        self.scheduler = scheduler
        self.costs = costs
        self.drafters: dict[str, Drafter] = {name: make(vocab_size) for name, make in DRAFTERS.items()}
        self.acceptance = Acceptance()
        self._offers: dict[int, Offer] = {}
        self._met: dict[int, Sequence] = {}  # those that ever could have used drafts, while they live

    def offer(self) -> None:
        """Before a plan: give the sequences that can use one a window of drafts."""
        ready = self.scheduler.draftable(METHOD)
        if not ready:
            return
        self._met.update((sequence.seq_id, sequence) for sequence in ready)
        room = self.scheduler.room_for_drafts()
        if room:
            self._offer_to(ready, room)

    def _offer_to(self, ready: list[Sequence], room: int) -> None:
        economy = self.costs.economy(*self.scheduler.without_drafts())
        if not may_pay(economy, min(room, MAX_LINE * len(ready))):
            return
        guesses = {sequence.seq_id: self._best(sequence) for sequence in ready}
        candidates = [Candidate(seq_id, chances) for seq_id, (_, _, chances) in guesses.items() if chances]
        for seq_id, count in grant(candidates, economy, room).items():
            name, guess, _ = guesses[seq_id]
            tokens = guess.tokens[:count]
            self._offers[seq_id] = Offer(name, guess.evidence, tokens)
            self.scheduler.offer(seq_id, Window(tokens, tuple(range(count)), optional=True))

    def learn(self, plan: StepPlan, outcomes: Iterable[Outcome]) -> dict[int, Verified]:
        """After a step, before its advances are applied: what became of its drafts, by sequence."""
        verified: dict[int, Verified] = {}
        if not self._met:
            return verified
        pieces = {piece.seq_id: piece for piece in plan.slices}
        for outcome in outcomes:
            advance, drawn = outcome.advance, outcome.drawn
            sequence = self._met.get(advance.seq_id)
            if sequence is None or not drawn:
                continue
            piece = pieces[advance.seq_id]
            for drafter in self.drafters.values():
                drafter.observe(sequence, piece.tokens[-len(drawn) :], drawn)
            offer = self._offers.pop(advance.seq_id, None) if piece.num_window else None
            if offer is not None:
                accepted = len(advance.committed) - 1
                num_drafts = len(offer.tokens)
                self.acceptance.note(advance.seq_id, offer.drafter, offer.evidence, num_drafts, accepted)
                verified[advance.seq_id] = Verified(offer.drafter, num_drafts, accepted)
        return verified

    def release(self, seq_id: int) -> None:
        """The sequence has ended; its tokens are final."""
        sequence = self._met.pop(seq_id, None)
        if sequence is None:
            return
        for drafter in self.drafters.values():
            drafter.release(sequence)
        self.acceptance.release(seq_id)
        self._offers.pop(seq_id, None)

    def _best(self, sequence: Sequence) -> tuple[str, Guess, tuple[float, ...]]:
        """Of the drafters that the request allows, the one whose guess is expected to gain most."""
        request = sequence.request
        limit = min(MAX_LINE, request.max_draft_tokens or MAX_LINE, self.scheduler.most_drafts(sequence))
        best: tuple[str, Guess, tuple[float, ...]] = ("", NO_GUESS, ())
        if limit < 1:
            return best
        names = self.drafters if request.drafter == AUTO else (request.drafter,)
        for name in names:
            guess = self.drafters[name].guess(sequence, limit)
            chances = self.acceptance.chances(sequence.seq_id, name, guess)
            if sum(chances) > sum(best[2]):
                best = (name, guess, chances)
        return best
