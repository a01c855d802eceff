"""A plan's slices to advances: batch, forward pass, sampling, decoding methods."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.batch import BatchBuilder
from engine.decoding import Decision, DecodingMethod, Draws, method_of
from engine.sampling.masks import unmasked
from engine.sampling.places import Place
from engine.sampling.processors import LogitsProcessor, needs_processing
from engine.sampling.sampler import NOT_FINITE, Drawn, logprobs_of, rows_of_piece, sample
from scheduler.plan import Advance, Slice, StepPlan
from scheduler.types import EMPTY_WINDOW, Sequence, Window

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.kv_storage import KVStorage
    from engine.messages import TokenLogprobs
    from engine.models.transformer import Transformer
    from engine.sampling.masks import MaskOf
    from scheduler.scheduler import Scheduler


class Computed(NamedTuple):
    """What drafters learn from a slice; see `engine.drafting.guess.Seen`. The tensors live as long as the
    step. `draws`: None where the slice ends before the last committed token."""

    features: tuple[torch.Tensor, ...]
    draws: Draws | None = None
    kept: tuple[int, ...] = ()


class Outcome(NamedTuple):
    """What a step made of one slice: the advance, and the log-probabilities that somebody asked for."""

    advance: Advance
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per committed token
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    refused: bool = False  # with an error: the request is at fault
    seen: Computed | None = None  # None where nothing of the slice counts


class _Work(NamedTuple):
    """One slice, and its rows of the batch."""

    piece: Slice
    sequence: Sequence
    first: int  # of its rows whose logits are wanted
    features: tuple[torch.Tensor, ...]
    num_scored: int = 0  # leading rows that score known prompt tokens
    places: tuple[Place, ...] = ()  # rows after them, to be sampled

    @property
    def sampled_rows(self) -> range:
        begin = self.first + self.num_scored
        return range(begin, begin + len(self.places))

    @property
    def scored_rows(self) -> range:
        """Those whose scores somebody wants."""
        wanted = self.sequence.request.sampling.prompt_logprobs is not None
        return range(self.first, self.first + (self.num_scored if wanted else 0))


class Runner:
    """Owns the per-sequence decoding methods and page tables; `release` forgets a sequence."""

    def __init__(
        self,
        model: Transformer,
        storage: KVStorage,
        batches: BatchBuilder,
        scheduler: Scheduler,
        mask_of: MaskOf = unmasked,
    ) -> None:
        self.model = model
        self.storage = storage
        self.batches = batches
        self.scheduler = scheduler
        self.mask_of = mask_of
        self.taps: tuple[int, ...] = ()  # hidden states that drafters want to see
        self.methods: dict[int, DecodingMethod] = {}
        self.processors: dict[int, LogitsProcessor | None] = {}

    @property
    def row_multiple(self) -> int:
        """Rows are computed in blocks of so many."""
        return self.batches.ops.row_multiple

    @property
    def tree_block(self) -> int:
        """A window that is a tree must lie within one block of so many slots."""
        return self.batches.ops.tree_block

    def release(self, seq_id: int) -> None:
        self.methods.pop(seq_id, None)
        self.processors.pop(seq_id, None)
        self.batches.release(seq_id)

    def set_aside(self, seq_id: int) -> None:
        """The sequence holds no pages for now; what else is known of it stays."""
        self.batches.release(seq_id)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> tuple[Outcome, ...]:
        """Where it raises, nothing has changed that the same slices, executed again together or apart, do not
        write again: page tables, their slots, the counts of processors."""
        if self.storage.tainted and (pages := self._fresh_pages(plan)):
            self.storage.clear(pages)
        batch = self.batches.build(plan)
        hidden, tapped = self.model.compute(batch, self.storage, self.taps)
        works = self._works(plan, tapped)
        scores = self._prompt_scores(works, hidden)
        rows = [row for work in works for row in work.sampled_rows]
        logits, drawn = torch.empty(0), Drawn([], {})
        if rows:
            wanted = batch.wanted if len(rows) == len(batch.wanted) else self.batches.row_index(rows)
            logits = self.model.logits(hidden, wanted)
            drawn = sample(logits, [place for work in works for place in work.places])
        outcomes = []
        used = 0
        for work in works:
            scored = tuple(scores[work.piece.seq_id]) if work.scored_rows else None
            outcomes.append(self._outcome(work, scored, logits, drawn, used))
            used += len(work.places)
        self._gather_kept(plan, outcomes)
        pieces = zip(plan.slices, outcomes, strict=True)
        self.batches.clear(self.storage, [piece for piece, outcome in pieces if outcome.advance.spoiled])
        return tuple(outcomes)

    def spoil(self, pieces: SequenceOf[Slice]) -> None:
        """After slices have raised: what they have written must not be met again. Pages are cleared when
        somebody gets them; `pieces` are those of sequences that go on, and keep theirs."""
        self.storage.tainted = True
        self.batches.clear(self.storage, pieces)

    def check_device(self) -> None:
        """Raises where the device computes nothing any more: some errors take all of it with them."""
        torch.ones(1, device=self.batches.device).add_(1).item()

    @torch.inference_mode()
    def prove(self) -> None:
        """Computes a made-up prompt over pages of nobody; raises where that fails as well."""
        batches, pages = self.batches, tuple(self.storage.scratch)
        room = len(pages) // len(batches.groups) * batches.page_size
        count = min(room, batches.max_slots, self.scheduler.config.max_num_batched_tokens)
        piece = Slice(0, 0, (0,) * count, range(count), 0, pages, num_logits=1)
        alone = BatchBuilder(
            self.model.config, batches.ops, batches.page_size, max(room, 1), 1, batches.device
        )
        self.model.forward(alone.build(StepPlan(0, (piece,))), self.storage).sum().item()

    def _gather_kept(self, plan: StepPlan, outcomes: list[Outcome]) -> None:
        """A path through a tree lies in scattered slots: its KV moves to where it is looked for."""
        moves = []
        for piece, outcome in zip(plan.slices, outcomes, strict=True):
            kept = outcome.seen.kept if outcome.seen is not None else ()
            if kept and kept[-1] >= len(kept):
                moves.append((piece.seq_id, piece.start + len(piece.tokens) - piece.num_window, kept))
        if moves:
            self.batches.move(self.storage, moves)

    def _fresh_pages(self, plan: StepPlan) -> list[int]:
        """Pages whose first slot is computed now or later; those before hold what was found, or are void."""
        size, num_groups = self.batches.page_size, len(self.batches.groups)
        return [
            page
            for piece in plan.slices
            for entry, page in enumerate(piece.new_pages, piece.first_new_page)
            if entry // num_groups * size >= piece.start
        ]

    def _works(self, plan: StepPlan, tapped: tuple[torch.Tensor, ...]) -> list[_Work]:
        works, row = [], 0
        for piece in plan.slices:
            end = row + len(piece.tokens)
            features = tuple(tap[row:end] for tap in tapped)
            works.append(self._work(piece, end - piece.num_logits, features))
            row = end
        return works

    def _work(self, piece: Slice, first: int, features: tuple[torch.Tensor, ...]) -> _Work:
        sequence = self.scheduler.sequence(piece.seq_id)
        end = piece.start + len(piece.tokens)
        committed = len(sequence.tokens)
        if not piece.num_logits or end != committed + piece.num_window:
            return _Work(piece, sequence, first, features, piece.num_logits)
        # A row after the last committed token, if it is computed now, and one after each window token.
        paths = _paths(sequence.window) if piece.num_window else [()]
        processor = self.processor_of(sequence)
        begin = 0 if piece.start < committed else 1
        places = tuple(Place(sequence, path, processor) for path in paths[begin:])
        if piece.num_window and sequence.window.optional and sequence.request.lossy is None:
            places = _where_drafts_stand(places, sequence.window)
        return _Work(piece, sequence, first, features, piece.num_logits - len(places), places)

    def _outcome(
        self,
        work: _Work,
        scored: tuple[TokenLogprobs, ...] | None,
        logits: torch.Tensor,
        drawn: Drawn,
        used: int,
    ) -> Outcome:
        """`used`: rows that were sampled of the slices before this one."""
        piece, sequence = work.piece, work.sequence
        known = len(piece.tokens) - piece.num_window
        if not work.places:
            advance = Advance(piece.seq_id, (), known, sequence.window)
            return Outcome(advance, prompt_logprobs=scored, seen=Computed(work.features))
        errors = drawn.errors_of(used, len(work.places))
        guesses = bool(piece.num_window) and sequence.window.optional
        if guesses and any(error.cause == NOT_FINITE for error in errors.values()):
            # Of a guess where plain decoding may never come; masked or not, it may be in every row.
            return Outcome(Advance(piece.seq_id, (), 0, spoiled=True))
        for row, error in errors.items():
            # After a guess nothing is wrong yet: plain decoding may never come there.
            if row == 0 or not guesses:
                self.storage.tainted |= error.cause == NOT_FINITE
                failed = Advance(piece.seq_id, (), known, error=error.cause)
                return Outcome(failed, refused=error.refused)
        tokens = tuple(drawn.tokens[used : used + len(work.places)])
        draws = Draws(
            len(tokens) > piece.num_window,
            tokens,
            logits,
            used,
            work.places,
            frozenset(errors),
        )
        decision = self._method(sequence).decide(sequence, draws)
        advance = Advance(
            seq_id=piece.seq_id,
            committed=decision.committed,
            num_valid=known + len(decision.kept),
            window=self._bounded(sequence, decision),
        )
        seen = Computed(work.features, draws, decision.kept)
        return Outcome(advance, _logprobs(sequence, draws, decision), scored, seen=seen)

    def _method(self, sequence: Sequence) -> DecodingMethod:
        method = self.methods.get(sequence.seq_id)
        if method is None:
            method = self.methods[sequence.seq_id] = method_of(sequence.request)
        return method

    def processor_of(self, sequence: Sequence) -> LogitsProcessor | None:
        """What the sequence's request asks of its logits; None where it asks nothing."""
        if sequence.seq_id not in self.processors:
            mask, found = self.mask_of(sequence), None
            if mask is not None or needs_processing(sequence.request.sampling):
                found = LogitsProcessor(sequence, self.model.config.vocab_size, self.batches.device, mask)
            self.processors[sequence.seq_id] = found
        return self.processors[sequence.seq_id]

    def _bounded(self, sequence: Sequence, decision: Decision) -> Window:
        """A window that would leave the context is not computed at all."""
        after = len(sequence.tokens) + len(decision.committed) + len(decision.window.tokens)
        return decision.window if after <= self.batches.max_slots else EMPTY_WINDOW

    def _prompt_scores(self, works: list[_Work], hidden: torch.Tensor) -> dict[int, list[TokenLogprobs]]:
        """By sequence. In pieces: the logits of a long prompt are gigabytes."""
        asked = [(work, row) for work in works for row in work.scored_rows]
        scores: dict[int, list[TokenLogprobs]] = {work.piece.seq_id: [] for work, _ in asked}
        together = rows_of_piece(self.model.config.vocab_size)
        for begin in range(0, len(asked), together):
            piece = asked[begin : begin + together]
            logits = self.model.logits(hidden, self.batches.row_index([row for _, row in piece]))
            first = 0
            for work, its in groupby(piece, key=lambda one: one[0]):
                targets = [_known_after(work, row) for _, row in its]
                count = work.sequence.request.sampling.prompt_logprobs
                assert count is not None, "nobody asked for these scores"
                part = logits[first : first + len(targets)]
                scores[work.piece.seq_id] += logprobs_of(part, targets, count)
                first += len(targets)
        return scores


def _known_after(work: _Work, row: int) -> int:
    """The token behind a row: that of slot s scores prompt token s + 1."""
    piece = work.piece
    first_slot = piece.start + len(piece.tokens) - piece.num_logits
    return work.sequence.tokens[first_slot + 1 + row - work.first]


def _paths(window: Window) -> list[tuple[int, ...]]:
    """The window's tokens that stand between the committed ones and each row: after the last committed
    token, then after each token of the window."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(window.tokens, window.parents, strict=True):
        paths.append((*paths[parent + 1], token))
    return paths


def _where_drafts_stand(places: tuple[Place, ...], window: Window) -> tuple[Place, ...]:
    """Drafts stand if they are drawn: after those that are not no draw is needed, and the noise for one takes
    as long as a row of a small model."""
    root, *rest = places
    behind = zip(rest, window.parents, strict=True)
    return (root, *(place._replace(after=node - parent) for node, (place, parent) in enumerate(behind)))


def _logprobs(sequence: Sequence, draws: Draws, decision: Decision) -> tuple[TokenLogprobs, ...] | None:
    count = sequence.request.sampling.logprobs
    if count is None:
        return None
    if not decision.committed:
        return ()
    logits = decision.logits
    if logits is None and decision.kept == tuple(range(len(decision.kept))):
        logits = draws.logits[: len(decision.committed)]
    elif logits is None:
        logits = draws.logits[[0, *(draft + 1 for draft in decision.kept)]]
    return tuple(logprobs_of(logits, list(decision.committed), count))
