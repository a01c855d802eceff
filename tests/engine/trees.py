"""A decoding method that exists to try the seam: it drafts random trees and verifies them."""

from __future__ import annotations

import random

import torch

from engine.decoding.method import Decision, Draws
from scheduler.types import EMPTY_WINDOW, Sequence, Visibility, Window

ROOT = -1


class TreeGuesser:
    """Proposes up to 12 tokens as a tree that holds a part of `oracle` somewhere among wrong ones.

    Sometimes it commits nothing and asks for the same places again, and sometimes it commits, or keeps, less
    of a path than stands. `paths`: of each path that was kept the nodes of the tree.
    """

    def __init__(self, oracle: list[int], seed: int, block: int) -> None:
        self.oracle = oracle
        self.random = random.Random(seed)
        self.block = block
        self.paths: list[tuple[int, ...]] = []
        self.tokens: tuple[int, ...] = ()  # of the row after the last committed token, once it is known
        self.logits = torch.empty(0)

    def decide(self, sequence: Sequence, draws: Draws) -> Decision:
        window = sequence.window
        assert len(draws.tokens) == len(draws.logits) == len(window.tokens) + draws.after_last
        if draws.after_last:
            self.tokens, self.logits = draws.tokens[:1], draws.logits[:1].clone()
        if window.tokens and self.random.random() < 0.2:
            return Decision((), window=window)
        tokens = self.tokens + draws.tokens[draws.after_last :]
        logits = torch.cat((self.logits, draws.logits[draws.after_last :]))
        path = self._path(window, tokens)
        if path and self.random.random() < 0.2:
            path = path[: self.random.randrange(len(path))]
        committed = tokens[:1] + tuple(tokens[node + 1] for node in path)
        kept = path[: self.random.randrange(len(path) + 1)] if self.random.random() < 0.2 else path
        self.paths.append(tuple(kept))
        return Decision(
            committed=committed,
            kept=tuple(kept),
            window=self._guess(sequence, committed),
            logits=logits[[0, *(node + 1 for node in path)]],
        )

    def _path(self, window: Window, tokens: tuple[int, ...]) -> list[int]:
        """Nodes that stand, one after the other."""
        path: list[int] = []
        for node, (token, parent) in enumerate(zip(window.tokens, window.parents, strict=True)):
            at = path[-1] if path else ROOT
            if parent == at and token == tokens[at + 1]:
                path.append(node)
        return path

    def _guess(self, sequence: Sequence, committed: tuple[int, ...]) -> Window:
        begin = len(sequence.tokens) + len(committed)
        room = min(self.random.randrange(13), self.block - begin % self.block)
        place = sequence.num_output + len(committed)
        right = [ROOT]  # nodes that follow the oracle
        parents: list[int] = []
        tokens: list[int] = []
        for node in range(room):
            parent = self.random.choice([right[-1], right[-1], self.random.randrange(ROOT, node)])
            token = self.random.randrange(300)
            if parent == right[-1] and self.random.random() < 0.7 and place + len(right) <= len(self.oracle):
                token = self.oracle[place + len(right) - 1]
            if (parent, token) in zip(parents, tokens, strict=True):
                continue
            if parent == right[-1] and self.oracle[place + len(right) - 1 :][:1] == [token]:
                right.append(len(tokens))
            parents.append(parent if parent < len(tokens) else ROOT)
            tokens.append(token)
        return tree(tokens, parents) if tokens else EMPTY_WINDOW


def tree(tokens: list[int], parents: list[int]) -> Window:
    """Each token follows that of its parent; ROOT: the last committed one."""
    words: list[int] = []
    for node, parent in enumerate(parents):
        words.append(1 << node | (words[parent] if parent != ROOT else 0))
    depths = tuple(word.bit_count() - 1 for word in words)
    return Window(tuple(tokens), depths, Visibility.ANCESTORS, tuple(words))
