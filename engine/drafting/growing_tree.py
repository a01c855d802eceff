"""A draft tree while it is being found: the most promising nodes are computed, and get children.

A node's score is the chance that it stands, and so all that it follows: the product of the chances on its
path (OPT-Tree, Wang 2024; DySpec, Xiong 2024). Of all nodes found the best `limit` are the guess; whatever is
not among them cannot have children that are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from engine.drafting.guess import ROOT, Guess
from engine.drafting.kinds import NUM_KINDS, belief_of, kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.standing import Standing

LEAST_SCORE = 0.01  # what is less likely is not drafted
MAX_COMPUTED = 64  # nodes, also those that dropped out of the best: each names in one word whom it sees


class Node(NamedTuple):
    """`chance` is the drafter's own, `score` what experience makes of it and of all before it."""

    token: int
    parent: int
    depth: int  # from 0
    rank: int  # among its parent's children
    chance: float
    score: float


class GrowingTree:
    """`drawn`: whether its tokens are drawn with noise."""

    def __init__(self, limit: int, standing: Standing, *, drawn: bool) -> None:
        self.limit = limit
        self.standing = standing
        self.drawn = drawn
        self.nodes: list[Node] = []
        self.computed: list[int] = []  # nodes that were computed, in the order of their slots
        self._words: dict[int, int] = {ROOT: 0}  # of each of these: which of them it follows, itself included
        self._best: list[int] = []

    def grow(self, parent: int, tokens: SequenceOf[int], chances: SequenceOf[float]) -> None:
        """The children of a node (or of ROOT), best first; those without a chance are none."""
        depth = self.nodes[parent].depth + 1 if parent != ROOT else 0
        above = self.nodes[parent].score if parent != ROOT else 1.0
        for rank, (token, chance) in enumerate(zip(tokens, chances, strict=True)):
            score = above * self._chance(chance, rank)
            if score >= LEAST_SCORE:
                self.nodes.append(Node(token, parent, depth, rank, chance, score))
        self._choose()

    def widen(self, limit: int) -> None:
        """More drafts than before may be among the best."""
        self.limit = max(self.limit, limit)
        self._choose()

    @property
    def expected(self) -> float:
        """Tokens that a step is expected to commit if the best nodes are verified."""
        return 1.0 + sum(self.nodes[node].score for node in self._best)

    def front(self) -> list[int]:
        """Nodes whose children may be among the best and that there is room for, best first."""
        deepest = self.limit - 1  # a line of all drafts ends there
        found = [node for node in self._best if node not in self._words and self.nodes[node].depth < deepest]
        return found[: MAX_COMPUTED - len(self.computed)]

    def path(self, node: int) -> tuple[int, ...]:
        """Tokens from the first draft to the node."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(self.nodes[node].token)
            node = self.nodes[node].parent
        return tuple(reversed(tokens))

    def compute(self, nodes: SequenceOf[int]) -> tuple[int, ...]:
        """The nodes get slots, after those computed before. -> for each a word: which of the computed nodes
        it sees, itself included."""
        for node in nodes:
            self._words[node] = self._words[self.nodes[node].parent] | 1 << len(self.computed)
            self.computed.append(node)
        return tuple(self._words[node] for node in nodes)

    @property
    def is_line(self) -> bool:
        """Whether every computed node follows the one computed before it."""
        return not self.computed or self._words[self.computed[-1]] == (1 << len(self.computed)) - 1

    def guess(self) -> Guess:
        number = {ROOT: ROOT} | {node: index for index, node in enumerate(self._best)}
        best = [self.nodes[node] for node in self._best]
        return Guess(
            tuple(node.token for node in best),
            tuple(number[node.parent] for node in best),
            tuple(kind_of(node.chance, node.rank) for node in best),
            tuple(belief_of(node.chance) for node in best),
        )

    def followed(self, tokens: SequenceOf[int]) -> tuple[int, ...]:
        """The text went on with these -> the path of nodes that it took. Which drafts stood is noted on the
        way."""
        children: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            children.setdefault(node.parent, []).append(index)
        taken: list[int] = []
        at = ROOT
        for token in tokens:
            following = ROOT
            for child in children.get(at, ()):
                node = self.nodes[child]
                stood = node.token == token
                self.standing.note(self._kind(node.chance, node.rank), stood)
                following = child if stood else following
            if following == ROOT:
                break
            taken.append(following)
            at = following
        return tuple(taken)

    def slots(self, nodes: SequenceOf[int]) -> tuple[int, ...]:
        """Of those that were computed."""
        found = {node: slot for slot, node in enumerate(self.computed)}
        return tuple(found[node] for node in nodes if node in found)

    def below(self, root: int, limit: int) -> tuple[GrowingTree, tuple[int, ...]]:
        """What grew behind a node, or behind ROOT, as a tree of its own -> that, and the slots that its
        computed nodes have in this one, in their order there."""
        tree = GrowingTree(limit, self.standing, drawn=self.drawn)
        top = self.nodes[root].depth + 1 if root != ROOT else 0
        number = {root: ROOT}
        for index, node in enumerate(self.nodes):
            if node.parent in number:
                parent = number[node.parent]
                number[index] = len(tree.nodes)
                above = tree.nodes[parent].score if parent != ROOT else 1.0
                score = above * self._chance(node.chance, node.rank)
                tree.nodes.append(node._replace(parent=parent, depth=node.depth - top, score=score))
        computed = [node for node in self.computed if number.get(node, ROOT) != ROOT]
        tree.compute([number[node] for node in computed])
        tree._choose()
        return tree, self.slots(computed)

    def _chance(self, chance: float, rank: int) -> float:
        """That such a node stands if its parent does; 0 stays 0."""
        return self.standing.chance(self._kind(chance, rank), belief_of(chance)) if chance else 0.0

    def _kind(self, chance: float, rank: int) -> int:
        """Where tokens are drawn with noise, a chance says something else."""
        return kind_of(chance, rank) + NUM_KINDS * self.drawn

    def _choose(self) -> None:
        ordered = sorted(range(len(self.nodes)), key=lambda node: (-self.nodes[node].score, node))
        self._best = ordered[: self.limit]
