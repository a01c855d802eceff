"""Between two steps: drafts for every sequence that wants them, as many as pay.

    whom to ask (yields) -> guesses -> chances by what was accepted before -> one tree for each sequence
    -> the scheduler grants -> windows

and after the step, what was accepted teaches the chances and the yields, and the step's time the cost of a
draft.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from engine.drafting import AUTO, LIGHT
from engine.drafting.acceptance import Acceptance
from engine.drafting.draft_tree import DraftTree, Proposal
from engine.drafting.guess import CATCHING_UP, ROOT, DraftsAhead, Seen, Want
from engine.drafting.ledger import Ledger
from engine.drafting.yields import Yields
from scheduler.speculation import Candidate, grant, may_pay

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.costs import DraftCosts
    from engine.drafting.guess import Drafter, Guess
    from engine.drafting.overlap import Overlap
    from engine.messages import Verified
    from engine.runner import Outcome
    from scheduler.plan import StepPlan
    from scheduler.scheduler import Scheduler
    from scheduler.speculation import StepEconomy
    from scheduler.types import Sequence

logger = logging.getLogger("octavo.engine")

METHOD = "speculative"
MAX_DRAFTS = 32  # of a drafter for one sequence in one step
MAX_GUESSED = 256  # of a drafter in one step: where many sequences share it, few drafts of each are granted
MAX_TREE = 64  # nodes: a row says in one word which of them it sees
TOGETHER = "light"  # those drafters that cost next to nothing, as one source


class Offer(NamedTuple):
    """A sequence that somebody was asked to draft for before this step, and what was offered of it.
    `sources`: those whose worth shows in what stands; who still read its text are not among them."""

    tree: DraftTree
    sources: tuple[str, ...]
    drafts: tuple[int, ...] = ()


class Speculation:
    """`tree_block`: a window that is a tree must lie within one block of so many slots. `overlap`: None where
    nobody drafts while the target computes."""

    def __init__(
        self,
        scheduler: Scheduler,
        costs: DraftCosts,
        drafters: Mapping[str, Drafter],
        vocab_size: int,
        tree_block: int,
        overlap: Overlap | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.costs = costs
        self.drafters = drafters
        self.vocab_size = vocab_size
        self.tree_block = tree_block
        self.overlap = overlap
        self.acceptance = Acceptance()
        self.yields = Yields()
        self.ledger = Ledger()
        self.taps = tuple(sorted(set(chain.from_iterable(one.taps for one in drafters.values()))))
        self.failed: set[str] = set()
        self._showing_s: dict[str, float] = {}  # by source: what telling it of the last step took
        self._waiting_s: dict[str, float] = {}  # by source: for how long a step that was done waited for it
        self._economy: StepEconomy | None = None  # of this step, if anybody was asked to draft for it
        self._most = MAX_DRAFTS  # for one sequence in this step
        self._spent_s = 0.0  # between this step and the one before, on drafting
        self._asked: dict[int, Offer] = {}  # in this step
        self._met: dict[int, Sequence] = {}  # those that drafters may know something of, while they live

    # Before a plan

    def offer(self) -> None:
        """Give the sequences that can use one a window of drafts."""
        self._asked.clear()
        self._economy = None
        ready = self.scheduler.draftable(METHOD)
        room = self.scheduler.room_for_drafts() if ready else 0
        if not room:
            return
        slices, num_committed = self.scheduler.without_drafts()
        if not num_committed or self.costs.lacks_plain(slices):
            return
        economy = self.costs.economy(slices, num_committed)
        self._most = max(1, min(MAX_DRAFTS, MAX_GUESSED // len(ready)))
        if not may_pay(economy, min(room, self._most * len(ready))):
            return
        if self.ledger.may_speculate(economy.num_committed):
            begun_s = time.perf_counter()
            trials_s = self._offer_to({one.seq_id: one for one in ready}, room, economy)
            self._economy, self._spent_s = economy, time.perf_counter() - begun_s - trials_s

    def _offer_to(self, ready: dict[int, Sequence], room: int, economy: StepEconomy) -> float:
        """-> seconds spent on trials, which have a bound of their own"""
        trials_s = 0.0
        self.yields.at(economy.num_committed)
        tokens_per_s = economy.num_committed / economy.step_s if economy.step_s else 0.0
        proposals: dict[int, list[Proposal]] = {seq_id: [] for seq_id in ready}
        trees: dict[int, DraftTree] = {}
        sources: dict[int, list[str]] = {seq_id: [] for seq_id in ready}
        for source, names in self._sources().items():
            rivals = {
                seq_id: sum(trees[seq_id].chances) if seq_id in trees else 0.0
                for seq_id, sequence in ready.items()
                if any(_allows(sequence, name) for name in names) and self._limit(sequence) > 0
            }
            asked = self.yields.worth_asking(source, rivals, tokens_per_s) if rivals else []
            if not asked:
                continue
            begun_s = time.perf_counter()
            behind: set[int] = set()
            for name in names:
                behind |= self._ask(name, [ready[seq_id] for seq_id in asked], proposals)
            trees |= {seq_id: DraftTree(proposals[seq_id]) for seq_id in asked}
            seconds = time.perf_counter() - begun_s
            if not self.yields.is_paying(source):
                trials_s += seconds
            seconds += self._showing_s.pop(source, 0.0) + self._waiting_s.pop(source, 0.0)
            self.yields.took(source, len(asked), seconds, num_behind=len(behind))
            for seq_id in asked:
                if seq_id not in behind:
                    sources[seq_id].append(source)
        self._met.update(ready)
        self._asked = {seq_id: Offer(tree, tuple(sources[seq_id])) for seq_id, tree in trees.items()}
        within = {
            seq_id: offer.tree.within(self._tree_room(ready[seq_id])) for seq_id, offer in self._asked.items()
        }
        sobriety = self.acceptance.sobriety
        candidates = [
            Candidate(seq_id, tuple(sobriety * self._asked[seq_id].tree.chances[draft] for draft in drafts))
            for seq_id, drafts in within.items()
        ]
        granted = grant(candidates, economy, room)
        if not granted and any(candidate.chances for candidate in candidates):
            self.acceptance.note_none_granted()
        for seq_id, places in granted.items():
            drafts = tuple(within[seq_id][place] for place in places)
            self._asked[seq_id] = self._asked[seq_id]._replace(drafts=drafts)
            self.scheduler.offer(seq_id, self._asked[seq_id].tree.window(drafts))
        return trials_s

    def _sources(self) -> dict[str, list[str]]:
        """The cheap ones first, together; then the others, each for itself."""
        light = [name for name in self.drafters if name in LIGHT]
        return {TOGETHER: light} | {name: [name] for name in self.drafters if name not in LIGHT}

    def _ask(self, name: str, sequences: list[Sequence], proposals: dict[int, list[Proposal]]) -> set[int]:
        """-> those whose text the drafter is still reading"""
        wants = [Want(one, self._limit(one)) for one in sequences if _allows(one, name)]
        behind: set[int] = set()
        if not wants or name in self.failed:
            return behind
        try:
            asked = list(zip(wants, self.drafters[name].guess(wants), strict=True))
            for want, guess in asked:
                self._check(want, guess)
        except Exception as failure:
            self._give_up(name, failure)
            return behind
        for want, guess in asked:
            seq_id = want.sequence.seq_id
            if guess is CATCHING_UP:
                behind.add(seq_id)
            if guess.tokens:
                chances = self.acceptance.chances(seq_id, _judged(want.sequence, name), guess)
                proposals[seq_id].append(Proposal(name, guess, chances))
        return behind

    def _check(self, want: Want, guess: Guess) -> None:
        """What is no tree of so many tokens would break the step of all."""
        if len(guess.tokens) > want.limit:
            raise ValueError(f"{len(guess.tokens)} drafts where {want.limit} are wanted")
        if guess.tokens and not 0 <= min(guess.tokens) <= max(guess.tokens) < self.vocab_size:
            raise ValueError(f"drafts outside the vocabulary: {guess.tokens}")
        lengths = {len(guess.tokens), len(guess.parents), len(guess.kinds), len(guess.beliefs)}
        if len(lengths) > 1 or not all(ROOT <= above < at for at, above in enumerate(guess.parents)):
            raise ValueError(f"drafts that are no tree: {guess}")

    def _limit(self, sequence: Sequence) -> int:
        asked = sequence.request.max_draft_tokens or self._most
        return min(self._most, asked, self.scheduler.most_drafts(sequence))

    def _tree_room(self, sequence: Sequence) -> int:
        """Nodes: of all drafters together no more than the request allows, the block or the context holds."""
        in_block = self.tree_block - len(sequence.tokens) % self.tree_block
        in_context = self.scheduler.max_model_len - len(sequence.tokens)
        return min(MAX_TREE, sequence.request.max_draft_tokens or MAX_TREE, in_block, in_context)

    # During a step

    @contextmanager
    def ahead(self, plan: StepPlan) -> Iterator[None]:
        """While the target verifies drafts, those who can go on drafting."""
        drafting = self._drafting_ahead(plan) if self.overlap is not None else {}
        if self.overlap is None or not drafting:
            yield
            return
        failed: dict[str, Exception] = {}
        try:
            self.overlap.start(drafting)
        except Exception as error:  # no thread is left, say: that is nothing to the step
            failed = dict.fromkeys(drafting, error)
        try:
            yield
        finally:
            done_s = time.perf_counter()
            try:
                failed |= self.overlap.stop()
            except Exception as error:
                failed |= dict.fromkeys(drafting, error)
            for name, failure in failed.items():
                self._give_up(name, failure)
            waited_s = time.perf_counter() - done_s
            self._waiting_s = {_source(name): waited_s / len(drafting) for name in drafting}
            self._spent_s += waited_s

    def _drafting_ahead(self, plan: StepPlan) -> dict[str, Iterator[None]]:
        """By drafter: for the sequences that it was asked for and that have drafts in this step. Where none
        were granted, load is high, or guesses are bad."""
        verified = {piece.seq_id for piece in plan.slices if piece.num_window} & self._asked.keys()
        drafting: dict[str, Iterator[None]] = {}
        for name, drafter in self.drafters.items():
            its = [seq_id for seq_id in verified if _source(name) in self._asked[seq_id].sources]
            if its and name not in self.failed and isinstance(drafter, DraftsAhead):
                try:
                    drafting[name] = drafter.ahead([self.scheduler.sequence(seq_id) for seq_id in its])
                except Exception as failure:
                    self._give_up(name, failure)
        return drafting

    def close(self) -> None:
        if self.overlap is not None:
            self.overlap.close()

    # After a step

    def learn(self, plan: StepPlan, outcomes: Iterable[Outcome]) -> dict[int, tuple[Verified, ...]]:
        """Before its advances are applied: what became of its drafts, by sequence."""
        begun_s, num_stood = time.perf_counter(), 0
        verified: dict[int, tuple[Verified, ...]] = {}
        seen: list[Seen] = []
        gains: dict[str, list[tuple[int, float]]] = {}
        num_drafts = sum(piece.num_window for piece in plan.slices)
        price = self._economy.price(num_drafts) if self._economy is not None else 0.0
        pieces = {piece.seq_id: piece for piece in plan.slices}
        for outcome in outcomes:
            computed, piece = outcome.seen, pieces[outcome.advance.seq_id]
            sequence = self.scheduler.sequence(piece.seq_id)
            if computed is None or sequence.request.method != METHOD:
                continue
            offer, draws = self._asked.get(piece.seq_id), computed.draws
            if offer is None and draws is None and not self.taps:
                continue
            parents = sequence.window.parents if piece.num_window else ()
            seen.append(
                Seen(
                    sequence,
                    piece.start,
                    piece.tokens,
                    parents,
                    draws.tokens if draws is not None else (),
                    computed.kept,
                    computed.features,
                    draws.logits if draws is not None else None,
                )
            )
            if offer is not None and len(offer.drafts) == piece.num_window:
                num_stood += len(computed.kept)
                path = [offer.drafts[place] for place in computed.kept]
                text = outcome.advance.committed
                for source, gain in self._judge(sequence, offer, path, text, price).items():
                    gains.setdefault(source, []).append((piece.seq_id, gain))
                if offer.drafts:
                    expected = sum(offer.tree.chances[draft] for draft in offer.drafts)
                    self.acceptance.note_granted(expected, len(path))
                    verified[piece.seq_id] = offer.tree.verified(offer.drafts, path)
        for source, counts in gains.items():
            self.yields.gained(source, counts)
        if seen:
            self._show(seen)
        if self._economy is not None:
            self._spent_s += time.perf_counter() - begun_s
            self._settle(self._economy, num_drafts, num_stood)
        return verified

    def _settle(self, economy: StepEconomy, num_drafts: int, num_stood: int) -> None:
        """What this step won, and what it cost."""
        won = num_stood / economy.num_committed
        if economy.step_s:
            won -= (self._spent_s + economy.added_s(num_drafts)) / economy.step_s
        self.ledger.note(economy.num_committed, won)

    def _judge(
        self, sequence: Sequence, offer: Offer, path: SequenceOf[int], text: SequenceOf[int], price: float
    ) -> dict[str, float]:
        """`text`: tokens that were committed; `price`: tokens, of a draft that was computed. -> what each
        source gained: drafts that stood, less the price of all of its"""
        drafts, stood = set(offer.drafts), set(path)
        known, right_ones = drafts, stood
        if sequence.request.lossy is None:
            # Also of drafts that were not granted: who is hopeless is never granted, and may become right.
            beside, matching = offer.tree.beside(path, text)
            known, right_ones = drafts | beside, stood | matching
        most_right = dict.fromkeys(offer.sources, 0)
        computed: dict[str, set[int]] = {source: set() for source in offer.sources}
        for number, proposal in enumerate(offer.tree.proposals):
            guess, right = offer.tree.part_of(number, known, right_ones)
            self.acceptance.note(sequence.seq_id, _judged(sequence, proposal.drafter), guess, right)
            source, places = _source(proposal.drafter), offer.tree.places[number]
            if source in computed:
                most_right[source] = max(most_right[source], len(stood.intersection(places)))
                computed[source] |= drafts.intersection(places)
        return {source: most_right[source] - price * len(computed[source]) for source in offer.sources}

    def _show(self, seen: list[Seen]) -> None:
        """To those who may draft for a sequence. Where nobody was asked, load is high: then the cheap ones,
        which can do without, are told nothing."""
        self._met.update((one.sequence.seq_id, one.sequence) for one in seen)
        self._showing_s.clear()
        for name, drafter in self.drafters.items():
            told = [one for one in seen if _allows(one.sequence, name)]
            if name in LIGHT:
                told = [one for one in told if one.drawn and one.sequence.seq_id in self._asked]
            elif drafter.taps != self.taps:
                places = [self.taps.index(tap) for tap in drafter.taps]
                told = [one._replace(features=tuple(one.features[place] for place in places)) for one in told]
            if not told or name in self.failed:
                continue
            begun_s = time.perf_counter()
            try:
                drafter.observe(told)
            except Exception as failure:
                self._give_up(name, failure)
            source = _source(name)
            spent_s = self._showing_s.get(source, 0.0)
            self._showing_s[source] = spent_s + time.perf_counter() - begun_s

    def _give_up(self, name: str, failure: Exception) -> None:
        """A drafter may cost time, and nothing else: one that raises, or guesses what is no tree, is not
        asked again."""
        if name in self.failed:
            return
        logger.error("the drafter %s failed: it is not asked any more", name, exc_info=failure)
        self.failed.add(name)

    def release(self, seq_id: int) -> None:
        """The sequence has ended; its tokens are final."""
        sequence = self._met.pop(seq_id, None)
        if sequence is None:
            return
        for name, drafter in self.drafters.items():
            try:  # also those that have failed: they still hold something
                drafter.release(sequence)
            except Exception as failure:
                self._give_up(name, failure)
        self.acceptance.release(seq_id)
        self.yields.release(seq_id)
        self._asked.pop(seq_id, None)


def _source(drafter: str) -> str:
    return TOGETHER if drafter in LIGHT else drafter


def _judged(sequence: Sequence, drafter: str) -> str:
    """Under which name its drafts for the sequence are counted: by another rule more of them stand."""
    return drafter if sequence.request.lossy is None else f"{drafter}, lossy"


def _allows(sequence: Sequence, drafter: str) -> bool:
    return sequence.request.drafter in (AUTO, drafter)
