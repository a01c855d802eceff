"""A decoding method that exists to try the seam: it drafts a line, right or wrong, and verifies it."""

from __future__ import annotations

import random

import torch

from engine.decoding.method import Decision, Draws
from scheduler.types import EMPTY_WINDOW, Sequence, Window


class LineGuesser:
    """Guesses the next 0..6 tokens from `oracle` (with mistakes) and commits 0..n tokens a step.

    A guess stands if it equals what the target samples there. Sometimes it commits nothing at all and
    asks for the same places again: a step that only prepares, as a denoising step does.
    """

    def __init__(self, oracle: list[int], seed: int) -> None:
        self.oracle = oracle
        self.random = random.Random(seed)
        self.commits: list[int] = []
        self.tokens: tuple[int, ...] = ()  # of the row after the last committed token, once it is known
        self.logits = torch.empty(0)

    def decide(self, sequence: Sequence, draws: Draws) -> Decision:
        window = sequence.window.tokens
        assert len(draws.tokens) == len(draws.logits) == len(window) + draws.after_last
        if draws.after_last:
            self.tokens, self.logits = draws.tokens[:1], draws.logits[:1].clone()
        if window and self.random.random() < 0.2:
            self.commits.append(0)
            return Decision((), window=_line(window))
        tokens = self.tokens + draws.tokens[draws.after_last :]
        logits = torch.cat((self.logits, draws.logits[draws.after_last :]))
        agreed = 0
        while agreed < len(window) and window[agreed] == tokens[agreed]:
            agreed += 1
        committed = tokens[: agreed + 1]
        self.commits.append(len(committed))
        return Decision(
            committed=committed,
            logits=logits[: agreed + 1],
            kept=tuple(range(agreed)),
            window=self._guess(sequence.num_output + len(committed)),
        )

    def _guess(self, place: int) -> Window:
        guess = self.oracle[place : place + self.random.randrange(7)]
        tokens = tuple(token if self.random.random() < 0.8 else (token + 1) % 300 for token in guess)
        return _line(tokens)


def _line(tokens: tuple[int, ...]) -> Window:
    return Window(tokens, tuple(range(len(tokens)))) if tokens else EMPTY_WINDOW
