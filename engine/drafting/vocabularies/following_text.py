"""How a draft model with a vocabulary of its own keeps up: with the text, not with the tokens.

The draft model has read a text as its own tokens, and drafts behind it. As the text goes on, its end may be
other tokens than before: what the KV holds of them is kept as far as it is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafting.draft_kv import DraftPiece
from engine.drafting.models.following import Following, Stretch
from engine.drafting.vocabularies.alignment import Alignment
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.draft_kv import DraftKV
    from engine.drafting.growing_tree import GrowingTree
    from engine.drafting.guess import Want
    from engine.drafting.vocabularies.speller import Speller
    from engine.drafting.vocabularies.vocabulary_map import VocabularyMap
    from scheduler.types import Sequence


READ_TOKENS = 1024  # of the target are spelled anew with one guess at most, over all sequences


class FollowingText(Following):
    """`num_known`: rows of the draft model."""

    def __init__(
        self,
        kv: DraftKV,
        max_len: int,
        num_known: int,
        spellers: tuple[Speller, Speller],
        shared: VocabularyMap,
    ) -> None:
        """`spellers`: of the target, of the draft model."""
        super().__init__(kv, max_len, num_known)
        self.spellers = spellers
        self.shared = shared
        self.alignments: dict[int, Alignment] = {}
        self._planted_at: dict[int, int] = {}  # the number of committed tokens
        self._said: dict[int, list[int]] = {}  # tokens of the draft model behind its text, computed as well

    def stretches(self, wants: SequenceOf[Want]) -> list[Stretch]:
        """Of a long text a part is read, those of which least is unread first."""
        left = READ_TOKENS
        readable: list[Want] = []
        for want in sorted(wants, key=self._num_unread):
            num_unread = self._num_unread(want)
            if self._follow(want.sequence, left):
                readable.append(want)
            left -= min(left, num_unread)
        found = super().stretches(readable)
        self.behind.update(want.sequence.seq_id for want in readable if not self.is_read(want.sequence))
        return found

    def text(self, sequence: Sequence) -> SequenceOf[int]:
        return self.alignments[sequence.seq_id].tokens

    def is_read(self, sequence: Sequence) -> bool:
        return self.alignments[sequence.seq_id].num_read == len(sequence.tokens)

    def named(self, token: int) -> int:
        return self.shared.draft_of(token)

    def plant(self, stretch: Stretch, tree: GrowingTree) -> None:
        super().plant(stretch, tree)
        self._planted_at[stretch.seq_id] = len(stretch.want.sequence.tokens)

    def say(self, stretch: Stretch, said: SequenceOf[int]) -> DraftPiece:
        """Behind the stretch the draft model goes on with these tokens of its own, of which the last is still
        to be computed."""
        self._said[stretch.seq_id] = list(said)
        slot = stretch.end + len(said) - 1
        return DraftPiece(stretch.seq_id, (said[-1],), (slot,), slot, num_logits=1)

    def release(self, seq_id: int) -> None:
        super().release(seq_id)
        self.alignments.pop(seq_id, None)
        self._said.pop(seq_id, None)
        self._planted_at.pop(seq_id, None)

    def _settle(self, wants: SequenceOf[Want]) -> None:
        """Each was settled when its text was read."""

    def _num_unread(self, want: Want) -> int:
        alignment = self.alignments.get(want.sequence.seq_id)
        return len(want.sequence.tokens) - (alignment.num_read if alignment is not None else 0)

    def _follow(self, sequence: Sequence, most: int) -> bool:
        """Read on; what is in the KV of tokens that the text has not is given up. Whether the draft model can
        read it."""
        seq_id = sequence.seq_id
        alignment = self.alignments.get(seq_id)
        if alignment is None:
            alignment = self.alignments[seq_id] = Alignment(*self.spellers)
        fixed = alignment.num_fixed
        if fixed > self.max_len:
            return False
        held = [*alignment.tokens[fixed:], *self._stood(sequence)]
        try:
            alignment.follow(sequence.tokens, most)
        except CheckpointError:  # of the tokeniser's library
            self.release(seq_id)
            return False
        same = 0
        for old, new in zip(held, alignment.tokens[fixed:], strict=False):
            if old != new:
                break
            same += 1
        self.kv.crop(seq_id, fixed + same)
        return True

    def _stood(self, sequence: Sequence) -> list[int]:
        """Tokens of the draft model that the KV holds behind the text that it has read."""
        seq_id = sequence.seq_id
        said = self._said.pop(seq_id, [])
        begin, tree = self._trees.pop(seq_id, (0, None))
        if tree is None:
            return said
        path = tree.slots(tree.followed(sequence.tokens[self._planted_at[seq_id] :]))
        if said or self.kv.length(seq_id) <= begin:
            return said
        self.kv.keep([(seq_id, begin, path)])
        return [self.named(tree.nodes[tree.computed[slot]].token) for slot in path]
