"""How a draft model with KV of its own keeps up with the sequences that it drafts for.

Between two guesses a sequence grows, by drafts of this model or of others: what of the model's own tree
stood stays in the KV, and the tokens that are missing are computed with the next guess. How many are is
bounded, and who lacks least comes first: a long prompt is caught up with over several guesses, and delays
nobody. Where the text has gone a way that the tree had grown beyond, nothing is missing: what grew there is
the beginning of the next tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from engine.drafting.draft_kv import TREE_SLOTS, DraftPiece
from engine.drafting.guess import ROOT
from scheduler.types import Visibility

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.draft_kv import DraftKV
    from engine.drafting.growing_tree import GrowingTree
    from engine.drafting.guess import Want
    from scheduler.types import Sequence

CATCH_UP_TOKENS = 512  # are computed with one guess at most, over all sequences
LONG = 128  # who lacks more tokens gets its drafts with the next guess: then all guesses take about as long


class Stretch(NamedTuple):
    """Committed tokens `start .. end` of a sequence, as the draft model reads them, to be computed now;
    `limit` drafts may follow where it `catches_up`: no committed token is behind them, and they are few.
    There are none where a tree has grown behind the last one already."""

    want: Want
    start: int
    end: int
    limit: int
    catches_up: bool

    @property
    def seq_id(self) -> int:
        return self.want.sequence.seq_id


class Following:
    """`max_len`: tokens that the draft model can have behind it; `num_known`: how many different ones it
    knows, from 0 on. Of the target's further ones each is to it the last that it knows. `behind`: those of
    the latest call that are still being read, or wait for their turn to be; later they get drafts."""

    def __init__(self, kv: DraftKV, max_len: int, num_known: int) -> None:
        self.kv = kv
        self.max_len = max_len
        self.num_known = num_known
        self.behind: set[int] = set()
        self._trees: dict[int, tuple[int, GrowingTree]] = {}  # planted behind so many committed tokens

    def stretches(self, wants: SequenceOf[Want]) -> list[Stretch]:
        """What to compute now, with room for it and for nodes behind it. A want that has none must wait, or
        is beyond the model."""
        self._settle(wants)
        able = [
            want for want in wants if want.limit > 0 and 0 < len(self.text(want.sequence)) <= self.max_len
        ]
        able.sort(key=self._num_lacking)
        roomy = self.kv.reserve(
            (want.sequence.seq_id, len(self.text(want.sequence)) + TREE_SLOTS) for want in able
        )
        for want in wants:
            if want.sequence.seq_id not in roomy:
                self._trees.pop(want.sequence.seq_id, None)
        found: list[Stretch] = []
        left = CATCH_UP_TOKENS
        for want in able:
            num_tokens = len(self.text(want.sequence))
            if self.grown(want.sequence) is not None:
                limit = min(want.limit, TREE_SLOTS)
                found.append(Stretch(want, num_tokens, num_tokens, limit, catches_up=True))
            elif want.sequence.seq_id in roomy and left:
                lacks = self._num_lacking(want)  # more than before if it lost its pages, and got new ones
                start = num_tokens - lacks
                end = start + min(lacks, left)
                left -= end - start
                limit = min(want.limit, TREE_SLOTS)
                catches_up = end == num_tokens and lacks <= LONG and self.is_read(want.sequence)
                found.append(Stretch(want, start, end, limit, catches_up))
        self.behind = roomy - {stretch.seq_id for stretch in found if stretch.catches_up}
        return found

    def piece(self, stretch: Stretch, masks: tuple[int, ...] = ()) -> DraftPiece:
        """The stretch and, where it catches up, `masks` behind it; with logits of its last token and of
        these. In the middle of a prompt there are none."""
        behind = masks if stretch.catches_up else ()
        return DraftPiece(
            seq_id=stretch.seq_id,
            tokens=(*self._known(self.text(stretch.want.sequence)[stretch.start : stretch.end]), *behind),
            positions=range(stretch.start, stretch.end + len(behind)),
            start=stretch.start,
            num_logits=1 + len(behind) if stretch.catches_up else 0,
        )

    def plant(self, stretch: Stretch, tree: GrowingTree) -> None:
        """The tree begins behind the stretch, which was computed."""
        self._trees[stretch.seq_id] = stretch.end, tree

    def grown(self, sequence: Sequence) -> GrowingTree | None:
        """The tree that has grown behind the last token of the text, if the KV of both is there."""
        begin, tree = self._trees.get(sequence.seq_id, (0, None))
        if tree is None or begin != len(self.text(sequence)):
            return None
        return tree if self.kv.length(sequence.seq_id) == begin + len(tree.computed) else None

    def nodes(self, seq_id: int, nodes: SequenceOf[int]) -> DraftPiece:
        """Nodes of the planted tree, with logits of each."""
        begin, tree = self._trees[seq_id]
        first = begin + len(tree.computed)
        words = tree.compute(nodes)
        piece = DraftPiece(
            seq_id=seq_id,
            tokens=self._known([self.named(tree.nodes[node].token) for node in nodes]),
            positions=tuple(begin + tree.nodes[node].depth for node in nodes),
            start=first,
            num_logits=len(nodes),
        )
        if tree.is_line:
            return piece
        visibility = Visibility.ANCESTORS
        return piece._replace(num_window=len(tree.computed), visibility=visibility, ancestors=words)

    def text(self, sequence: Sequence) -> SequenceOf[int]:
        """The committed tokens as the draft model reads them."""
        return sequence.tokens

    def is_read(self, sequence: Sequence) -> bool:
        """Whether that is all of them."""
        return True

    def named(self, token: int) -> int:
        """A draft as the draft model reads it."""
        return token

    def release(self, seq_id: int) -> None:
        self._trees.pop(seq_id, None)
        self.kv.release(seq_id)

    def _settle(self, wants: SequenceOf[Want]) -> None:
        """Of the trees of the last guesses only the nodes that stood remain, and what grew behind the text
        that is there now."""
        paths = []
        for want in wants:
            seq_id, tokens = want.sequence.seq_id, want.sequence.tokens
            begin, tree = self._trees.pop(seq_id, (0, None))
            if tree is None:
                continue
            taken = tree.followed(tokens[begin:])
            kept = tree.slots(taken)
            if self.kv.length(seq_id) != begin + len(tree.computed):
                continue  # it has lost its pages
            if begin + len(kept) == len(tokens):
                rest, slots = tree.below(taken[-1] if taken else ROOT, min(want.limit, TREE_SLOTS))
                if rest.nodes:
                    self._trees[seq_id] = len(tokens), rest
                    kept += slots
            paths.append((seq_id, begin, kept))
        self.kv.keep(paths)

    def _num_lacking(self, want: Want) -> int:
        """The last token is always computed, for its logits."""
        num_tokens = len(self.text(want.sequence))
        return num_tokens - min(self.kv.length(want.sequence.seq_id), num_tokens - 1)

    def _known(self, tokens: SequenceOf[int]) -> tuple[int, ...]:
        return tuple(min(token, self.num_known - 1) for token in tokens)
