"""A smaller model of the same vocabulary drafts (Leviathan 2023): a few passes of its own for one of the
target's.

It grows trees, level by level: each pass computes the most promising nodes of all sequences, and what may
follow them are drafts, second and third choices too, which cost no pass. It stops where another pass is
expected to gain fewer tokens than its time is worth.

While the target verifies, the trees can go on growing (PEARL, Liu 2024: drafting and verification overlap).
Wherever a tree has grown beyond the text that is then committed, the next guess begins with what is there.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch

from engine.drafting.growing_tree import MAX_COMPUTED, GrowingTree
from engine.drafting.guess import CATCHING_UP, NO_GUESS, ROOT
from engine.drafting.models.draft_model import load_draft_model, pass_cost
from engine.drafting.standing import Standing
from engine.sampling.places import Place
from engine.sampling.ranking import is_random

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as SequenceOf

    from engine.checkpoint import Checkpoint
    from engine.drafting.guess import Guess, Seen, Want
    from engine.drafting.models.draft_model import DraftModel
    from engine.drafting.models.following import Following, Stretch
    from engine.drafting.surroundings import Surroundings
    from scheduler.types import Sequence

MAX_PASSES = 24  # with one guess
MUCH_LESS = 0.1  # of the chance of a tree's best node: such nodes are not computed with it
GAIN = 0.8  # the chances of a pass's nodes, times this, are the tokens that it is expected to gain
LEAST_AHEAD = 0.25  # tokens: a pass for which the target may have to wait should be likely to be of use


def load(checkpoint: Checkpoint, around: Surroundings, free_bytes: int) -> SmallModel:
    """Raises CheckpointError for what cannot be served or does not fit."""
    draft, following = load_draft_model(checkpoint, around, free_bytes)
    return SmallModel(draft, following, pass_cost(checkpoint.transformer, around.model.config))


class SmallModel:
    """`cost`: the time of one of its passes, in passes of the target."""

    taps: tuple[int, ...] = ()

    def __init__(self, draft: DraftModel, following: Following, cost: float) -> None:
        self.draft = draft
        self.following = following
        self.cost = cost
        self.row_multiple = draft.model.ops.row_multiple
        self.standing = Standing()

    @torch.inference_mode()
    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        stretches = self.following.stretches(wants)
        guesses = dict.fromkeys(self.following.behind, CATCHING_UP)
        sequences = {want.sequence.seq_id: want.sequence for want in wants}
        trees = self._grown(sequences.values())
        missing = [stretch for stretch in stretches if stretch.seq_id not in trees]
        if missing:
            logits = self.draft.logits([self.following.piece(stretch) for stretch in missing])
            trees |= self._planted([stretch for stretch in missing if stretch.catches_up], logits)
        num_passes = 1 if missing else 0
        while num_passes < MAX_PASSES and (nodes := self._worthwhile(trees, num_passes)):
            self._grow(trees, nodes, sequences)
            num_passes += 1
        guesses |= {seq_id: tree.guess() for seq_id, tree in trees.items()}
        return [guesses.get(want.sequence.seq_id, NO_GUESS) for want in wants]

    @torch.inference_mode()
    def ahead(self, sequences: SequenceOf[Sequence]) -> Iterator[None]:
        """The trees of these go on growing as if all of it cost nothing, a pass with each item. To no mask:
        it may not be asked by two threads at a time."""
        trees = self._grown(sequences)
        able: dict[int, Sequence] = {}
        for sequence in sequences:
            processor = self.draft.processor_of(sequence)
            if sequence.seq_id in trees and (processor is None or processor.mask is None):
                able[sequence.seq_id] = sequence
                trees[sequence.seq_id].widen(MAX_COMPUTED)
                if processor is not None:
                    processor.catch_up()  # now: while both threads use it, neither may change it
        return self._passes_ahead({seq_id: trees[seq_id] for seq_id in able}, able)

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """Committed tokens say all."""

    def release(self, sequence: Sequence) -> None:
        self.following.release(sequence.seq_id)

    def _planted(self, ready: list[Stretch], logits: torch.Tensor) -> dict[int, GrowingTree]:
        """Trees of what may follow the last committed tokens, by sequence."""
        trees: dict[int, GrowingTree] = {}
        roots = [(stretch.want.sequence, ()) for stretch in ready]
        for stretch, best in zip(ready, self.draft.successors(logits, roots), strict=True):
            drawn = is_random(Place(stretch.want.sequence))
            tree = GrowingTree(stretch.limit, self.standing, drawn=drawn)
            tree.grow(ROOT, best.tokens, best.chances)
            self.following.plant(stretch, tree)
            trees[stretch.seq_id] = tree
        return trees

    def _grown(self, sequences: Iterable[Sequence]) -> dict[int, GrowingTree]:
        """Trees that have grown behind the last committed tokens already, by sequence."""
        found = ((one.seq_id, self.following.grown(one)) for one in sequences)
        return {seq_id: tree for seq_id, tree in found if tree is not None}

    def _passes_ahead(self, trees: dict[int, GrowingTree], sequences: dict[int, Sequence]) -> Iterator[None]:
        while True:
            nodes, gain = self._likeliest(trees)
            if gain < LEAST_AHEAD:
                return
            self._grow(trees, nodes, sequences)
            yield

    def _worthwhile(self, trees: dict[int, GrowingTree], num_passes: int) -> dict[int, list[int]]:
        """The nodes to compute next, by sequence; none where a pass costs more than it gains: tokens per
        second would fall."""
        nodes, gain = self._likeliest(trees)
        rate = sum(tree.expected for tree in trees.values()) / (1.0 + num_passes * self.cost)
        return nodes if gain > rate * self.cost else {}

    def _likeliest(self, trees: dict[int, GrowingTree]) -> tuple[dict[int, list[int]], float]:
        """The nodes of a pass, by sequence, and the tokens that it is expected to gain. As many rows as there
        are sequences, and those that fill up a block of rows."""
        num_rows = len(trees) + -len(trees) % self.row_multiple
        front = [
            (tree.nodes[node].score, seq_id, node)
            for seq_id, tree in trees.items()
            for node in _leading(tree)
        ]
        front.sort(reverse=True)
        del front[num_rows:]
        nodes: dict[int, list[int]] = {}
        for _, seq_id, node in front:
            nodes.setdefault(seq_id, []).append(node)
        return nodes, GAIN * sum(score for score, _, _ in front)

    def _grow(
        self, trees: dict[int, GrowingTree], nodes: dict[int, list[int]], sequences: dict[int, Sequence]
    ) -> None:
        """Compute these nodes, and give them children."""
        pieces = [self.following.nodes(seq_id, members) for seq_id, members in nodes.items()]
        after = [
            (sequences[seq_id], trees[seq_id].path(node))
            for seq_id, members in nodes.items()
            for node in members
        ]
        best = iter(self.draft.successors(self.draft.logits(pieces), after))
        for seq_id, members in nodes.items():
            for node, found in zip(members, islice(best, len(members)), strict=True):
                trees[seq_id].grow(node, found.tokens, found.chances)


def _leading(tree: GrowingTree) -> list[int]:
    front = tree.front()
    least = MUCH_LESS * tree.nodes[front[0]].score if front else 0.0
    return [node for node in front if tree.nodes[node].score >= least]
