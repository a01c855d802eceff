"""Self-speculation by skipped layers: the draft is the target itself without some of its layers.

No weights beside the target's and no training (Zhang 2023, "Draft & Verify"; Xia 2024, "SWIFT: On-the-Fly
Self-Speculative Decoding"). The layers that are computed read the target's own KV of the committed tokens;
what they write goes to scratch pages (`scratch_pages.py`). Which layers are skipped is searched while serving
(`layer_search.py`): every so often the best set and a proposal both compute some tokens that are committed
already, and say what they would have drawn there. Whole layers are skipped, where SWIFT may skip a layer's
attention or MLP alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.drafting.growing_tree import GrowingTree
from engine.drafting.guess import NO_GUESS, ROOT
from engine.drafting.models.draft_model import SUCCESSORS
from engine.drafting.skips.layer_search import LONGEST_DRAFT, LayerSearch
from engine.drafting.skips.scratch_pages import Piece, ScratchPages, Stretch
from engine.drafting.standing import Standing
from engine.sampling.candidates import candidates
from engine.sampling.places import Place
from engine.sampling.ranking import is_random
from scheduler.types import Sequence

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Guess, Seen, Want
    from engine.drafting.surroundings import Surroundings
    from engine.models.transformer import Rows, Transformer

TRIAL_ROWS = 16  # committed tokens that a set of layers is tried on at a time
MAX_TRIALS = 4  # with one guess: whoever is asked rarely has some to catch up with
TRIAL_EVERY = 192  # tokens that are committed between two trials; twice as many ..
PATIENCE = 12  # .. each time that so many proposals in a row were no better, up to
RAREST_TRIAL = 4096


@dataclass(slots=True)
class _Draft:
    """A sequence's guess as it grows: a line of first choices, and others beside it."""

    stretch: Stretch
    tree: GrowingTree
    line: tuple[int, ...] = ()
    tip: int = ROOT

    def add(self, tokens: list[int], chances: list[float]) -> bool:
        """What may follow the line, best first -> whether it goes on with that."""
        first = len(self.tree.nodes)
        self.tree.grow(self.tip, tokens, chances)
        if len(self.tree.nodes) == first:
            return False
        self.tip = first
        self.line += (self.tree.nodes[first].token,)
        return True

    def is_worth(self, share: float) -> bool:
        """Whether the next draft may be: it costs this share of a step, and so likely it should be."""
        chance = self.tree.nodes[self.tip].score
        return chance >= share and len(self.line) < self.stretch.length


class SkippedLayers:
    """`taps`: none. Without scratch pages in the target's storage it guesses nothing."""

    taps: tuple[int, ...] = ()

    def __init__(self, around: Surroundings, search: LayerSearch | None = None) -> None:
        self._around = around
        self._scratch = ScratchPages(around)
        model = around.model
        self.search = search or LayerSearch(model.config.num_layers, head_layers=head_layers(model))
        self.standing = Standing()
        self._trees: dict[int, tuple[int, GrowingTree]] = {}  # guessed behind so many tokens
        self._num_committed = 0  # since the last trial
        self._num_trials = 0

    @torch.inference_mode()
    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        drafts = {want.sequence.seq_id: draft for want in wants if (draft := self._begun(want)) is not None}
        if drafts:
            self._search([draft.stretch.sequence for draft in drafts.values()])
        if self.search.share(self.search.skipped) >= 1.0:
            return [NO_GUESS] * len(wants)  # nothing that may be skipped is worth it: drafts would cost steps
        stretches = (draft.stretch for draft in drafts.values())
        for together in self._scratch.batches(stretches):
            self._scratch.lend(together)
            self._grow([drafts[stretch.sequence.seq_id] for stretch in together])
        return [
            drafts[want.sequence.seq_id].tree.guess() if want.sequence.seq_id in drafts else NO_GUESS
            for want in wants
        ]

    def observe(self, seen: SequenceOf[Seen]) -> None:
        self._num_committed += sum(len(one.kept) + 1 for one in seen if one.drawn)

    def release(self, sequence: Sequence) -> None:
        self._trees.pop(sequence.seq_id, None)

    def _begun(self, want: Want) -> _Draft | None:
        sequence, start = want.sequence, len(want.sequence.tokens) - 1
        begin, before = self._trees.pop(sequence.seq_id, (0, None))
        if before is not None:
            before.followed(sequence.tokens[begin:])  # how good its chances were is noted
        # The last draft needs no slot: nothing follows it.
        length = min(want.limit, LONGEST_DRAFT, self._scratch.fits(start))
        if length < 1 or sequence.num_computed != start:
            return None
        tree = GrowingTree(want.limit, self.standing, drawn=is_random(Place(sequence)))
        self._trees[sequence.seq_id] = start + 1, tree
        return _Draft(Stretch(sequence, start, length), tree)

    def _grow(self, drafts: list[_Draft]) -> None:
        """One token further for all of them, until none is worth another."""
        search = self.search
        kept, share = search.kept(search.skipped), search.share(search.skipped)
        while drafts:
            pieces, places = [], []
            for draft in drafts:
                sequence, start, _ = draft.stretch
                last = draft.line[-1] if draft.line else sequence.tokens[-1]
                pieces.append(Piece(sequence.seq_id, start + len(draft.line), (last,)))
                places.append(Place(sequence, draft.line, self._around.processor_of(sequence)))
            best = candidates(self._logits(self._scratch.rows(pieces), kept), places, SUCCESSORS)
            found = zip(drafts, best.tokens.tolist(), best.chances.tolist(), strict=True)
            drafts = [
                draft
                for draft, tokens, chances in found
                if draft.add(tokens, chances) and draft.is_worth(share)
            ]

    def _logits(self, rows: Rows, kept: tuple[int, ...]) -> torch.Tensor:
        model = self._around.model
        return model.logits(model.compute(rows, self._around.storage, layers=kept)[0], rows.wanted)

    def _trial_every(self) -> int:
        return int(min(RAREST_TRIAL, TRIAL_EVERY << min(8, self.search.num_rejected // PATIENCE)))

    def _search(self, sequences: list[Sequence]) -> None:
        due = min(MAX_TRIALS, self._num_committed // max(1, self._trial_every()))
        if not due:
            return
        self._num_committed = 0
        told = [one for one in sequences if one.num_output >= TRIAL_ROWS]
        for _ in range(due if told else 0):
            self._num_trials += 1
            self._try(told[self._num_trials % len(told)])

    def _try(self, sequence: Sequence) -> None:
        """Have the best set and the proposal say some of the committed output again."""
        proposal = self.search.proposal()
        back = self._num_trials % (sequence.num_output // TRIAL_ROWS) * TRIAL_ROWS
        stretch = Stretch(sequence, len(sequence.tokens) - 1 - TRIAL_ROWS - back, TRIAL_ROWS)
        if proposal is None or self._scratch.fits(stretch.start) < TRIAL_ROWS:
            return
        if self._scratch.readable(sequence, stretch.start):
            right = (self._num_right(stretch, skipped) for skipped in (self.search.skipped, proposal))
            self.search.note(TRIAL_ROWS, *right)

    def _num_right(self, stretch: Stretch, skipped: frozenset[int]) -> int:
        """How many of the tokens behind these slots they say as the target did. What the request asks of
        its logits is left out, as it depends on what was committed then."""
        sequence, start, count = stretch
        self._scratch.lend([stretch])
        computed, said = (tuple(sequence.tokens[first : first + count]) for first in (start, start + 1))
        logits = self._logits(
            self._scratch.rows([Piece(sequence.seq_id, start, computed)]), self.search.kept(skipped)
        )
        then = Sequence(sequence.seq_id, sequence.request, sequence.index, sequence.tokens[: start + 1])
        found = candidates(logits, [Place(then, said[:number]) for number in range(count)], 1).tokens
        return sum(mine == theirs for mine, theirs in zip(found.view(-1).tolist(), said, strict=True))


def head_layers(model: Transformer) -> float:
    """What the head costs, in layers: by the numbers that each reads of its weights."""
    config = model.config
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    mlp = config.intermediate_size
    if config.experts is not None and all(layer.experts for layer in config.layers):
        mlp = config.experts.per_token * config.experts.intermediate_size
    return config.vocab_size / (heads + 3 * mlp)
