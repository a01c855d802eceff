"""A drafter whose head reads the target's hidden states: EAGLE and multi-token prediction.

With each guess the head first reads what the target has computed since, in the place of what it had made up
there itself. Then it grows a tree, level by level, as EAGLE-2 (Li 2024) does: each pass computes the nodes
whose followers may be among the best drafts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.drafting.draft_kv import TREE_SLOTS, DraftPiece
from engine.drafting.growing_tree import GrowingTree
from engine.drafting.guess import CATCHING_UP, NO_GUESS, ROOT
from engine.drafting.heads.catching_up import readers
from engine.drafting.heads.waiting_features import MAX_WAITING_BYTES, WaitingFeatures
from engine.drafting.standing import Standing
from engine.sampling.candidates import candidates
from engine.sampling.places import Place
from engine.sampling.ranking import is_random
from scheduler.types import Visibility

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.draft_kv import DraftKV
    from engine.drafting.guess import Guess, Seen, Want
    from engine.drafting.heads.catching_up import Reader
    from engine.drafting.heads.heads import Head
    from engine.drafting.heads.waiting_features import Progress
    from engine.drafting.surroundings import Surroundings
    from scheduler.types import Sequence

WIDTH = 8  # drafts that may stand at one place
MAX_PASSES = 7  # with one guess, behind the one that reads
GAIN = 0.8  # a pass gains so much of the chances of the nodes that it computes


class _Growth(NamedTuple):
    """One sequence's tree while it grows. `made` [hidden]: a feature for each node that was computed."""

    want: Want
    progress: Progress
    tree: GrowingTree
    made: list[torch.Tensor]

    @property
    def seq_id(self) -> int:
        return self.want.sequence.seq_id

    def feature_behind(self, node: int) -> torch.Tensor:
        """[hidden]: made of the node's place, or of the last committed token's (ROOT)"""
        if node != ROOT:
            return self.made[self.tree.computed.index(node)]
        assert self.progress.feature is not None, "a tree without a root"
        return self.progress.feature


class HeadDrafter:
    """Positions in the head are counted from the first row that it has of a sequence: rotary positions are
    relative, so it makes no difference where they begin, and so slots and windows stay in step with them.

    `cost`: of a pass, in passes of the target.
    """

    def __init__(self, head: Head, kv: DraftKV, around: Surroundings, cost: float) -> None:
        self.head = head
        self.taps = head.taps
        self.kv = kv
        self.around = around
        self.cost = cost
        self.standing = Standing()
        row_bytes = len(head.taps) * around.model.config.hidden_size * around.dtype.itemsize
        self.waiting = WaitingFeatures(max(1, MAX_WAITING_BYTES // row_bytes))
        self._trees: dict[int, tuple[int, GrowingTree]] = {}  # the last guess, and how many tokens it follows

    def observe(self, seen: SequenceOf[Seen]) -> None:
        self.waiting.observe(seen)

    def release(self, sequence: Sequence) -> None:
        self.waiting.release(sequence.seq_id)
        self.kv.release(sequence.seq_id)
        self._trees.pop(sequence.seq_id, None)

    @torch.inference_mode()
    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        self._learn(wants)
        able = self._read(wants)
        growths = [self._planted(reader) for reader in able if reader.catches_up]
        if growths:
            self._grow([(growth, ROOT) for growth in growths])
        for num_passes in range(MAX_PASSES):
            if not self._deepen(growths, num_passes):
                break
        for growth in growths:
            self.kv.crop(growth.seq_id, growth.progress.num_read)
        guesses = dict.fromkeys((reader.seq_id for reader in able), CATCHING_UP)
        guesses |= {growth.seq_id: growth.tree.guess() for growth in growths}
        return [guesses.get(want.sequence.seq_id, NO_GUESS) for want in wants]

    def _learn(self, wants: SequenceOf[Want]) -> None:
        """What became of the drafts that were guessed last."""
        for want in wants:
            length, tree = self._trees.pop(want.sequence.seq_id, (0, None))
            if tree is not None:
                tree.followed(want.sequence.tokens[length:])

    def _read(self, wants: SequenceOf[Want]) -> list[Reader]:
        """-> who has read something, or will"""
        able = readers(wants, self.waiting, self.kv, TREE_SLOTS)
        reading = [(reader, reader.rows) for reader in able if reader.rows is not None]
        if reading:
            features = self.head.features(self._padded(torch.cat([rows for _, rows in reading])))
            made = self._computed([_piece(reader) for reader, _ in reading], features)
            end = 0
            for reader, rows in reading:
                end += len(rows)
                reader.progress.feature = made[end - 1].clone()
        return able

    def _planted(self, reader: Reader) -> _Growth:
        want = reader.want
        drawn = is_random(Place(want.sequence))
        tree = GrowingTree(want.limit, self.standing, drawn=drawn)
        self._trees[want.sequence.seq_id] = len(want.sequence.tokens), tree
        return _Growth(want, reader.progress, tree, [])

    def _deepen(self, growths: list[_Growth], num_passes: int) -> bool:
        """Compute the most promising nodes of the trees, unless a pass costs more than it gains: tokens per
        second would fall. As many rows as there are sequences, and those that fill up a block of rows."""
        found = [(growth, node) for growth in growths for node in growth.tree.front()]
        found.sort(key=lambda entry: -entry[0].tree.nodes[entry[1]].score)
        del found[len(growths) + -len(growths) % self.around.ops.row_multiple :]
        gain = GAIN * sum(growth.tree.nodes[node].score for growth, node in found)
        expected = sum(growth.tree.expected for growth in growths)
        if not found or gain * (1.0 + num_passes * self.cost) < expected * self.cost:
            return False
        chosen: dict[int, list[int]] = {}
        for growth, node in found:
            chosen.setdefault(growth.seq_id, []).append(node)
        fronts = [(growth, chosen[growth.seq_id]) for growth in growths if growth.seq_id in chosen]
        parents = [(growth, node) for growth, nodes in fronts for node in nodes]
        before = [growth.feature_behind(growth.tree.nodes[node].parent) for growth, node in parents]
        pieces = [_guessing(growth, nodes) for growth, nodes in fronts]
        made = self._computed(pieces, self._padded(torch.stack(before)))
        for row, (growth, _) in enumerate(parents):
            growth.made.append(made[row])
        self._grow(parents)
        return True

    def _computed(self, pieces: list[DraftPiece], features: torch.Tensor) -> torch.Tensor:
        return self.head.compute(features, self.kv.rows(pieces), self.kv.storage)

    def _grow(self, parents: list[tuple[_Growth, int]]) -> None:
        """What may stand behind these nodes, whose features were made."""
        features = torch.stack([growth.feature_behind(node) for growth, node in parents])
        logits = self.head.logits(self._padded(features))[: len(parents)]
        places = [
            Place(
                growth.want.sequence, growth.tree.path(node), self.around.processor_of(growth.want.sequence)
            )
            for growth, node in parents
        ]
        found = candidates(logits, places, WIDTH)
        children = zip(found.tokens.tolist(), found.chances.tolist(), strict=True)
        for (growth, node), (tokens, chances) in zip(parents, children, strict=True):
            growth.tree.grow(node, tokens, chances)
            if not chances[0]:
                self.kv.storage.tainted = True  # perhaps numbers went wrong: pages are cleared from now on

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        missing = -len(rows) % self.around.ops.row_multiple
        return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _piece(reader: Reader) -> DraftPiece:
    """The rows that are read: each has the token behind its place."""
    first = reader.progress.first + reader.start + 1
    tokens = tuple(reader.want.sequence.tokens[first : first + reader.count])
    places = range(reader.start, reader.start + reader.count)
    return DraftPiece(reader.seq_id, tokens, places, reader.start, num_logits=0)


def _guessing(growth: _Growth, nodes: list[int]) -> DraftPiece:
    """Nodes of the tree, which lies behind what was read."""
    begin, tree = growth.progress.num_read, growth.tree
    start = begin + len(tree.computed)
    words = tree.compute(nodes)
    return DraftPiece(
        growth.seq_id,
        tuple(tree.nodes[node].token for node in nodes),
        tuple(begin + tree.nodes[node].depth for node in nodes),
        start,
        num_logits=0,
        num_window=len(tree.computed),
        visibility=Visibility.ANCESTORS,
        ancestors=words,
    )
