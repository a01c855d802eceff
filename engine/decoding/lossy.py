"""Verification of drafts that need not be what the target draws: faster, and another text.

What the target draws after the last draft that stands is committed as always. Bans, masks and truncation
hold: what cannot be drawn has a probability of 0. But the text depends on who drafted and how much, so the
same seed may give another one, and so may what follows after the engine was started again in the middle.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from engine.decoding.method import Decision, Draws
from engine.sampling.distribution import distribution
from engine.sampling.ranking import is_random
from scheduler.types import EMPTY_WINDOW

if TYPE_CHECKING:
    from scheduler.types import LossyAcceptance, Sequence

ROOT = -1


class Lossy:
    """By `Request.lossy`, under the distribution that the request asks to draw from:

    - "typical" (Cai 2024, Medusa): a draft stands if its probability exceeds
      min(epsilon, delta * exp(-entropy)). A greedy request has no such distribution, and stays lossless.
    - "threshold": a draft stands if its probability is at least `threshold` times the largest one. That asks
      of a draft what a judge would, whether it is good enough (Bachmann 2025), without the head that they
      train for it. Of a greedy request the distribution at temperature 1.
    """

    def decide(self, sequence: Sequence, draws: Draws) -> Decision:
        assert draws.after_last, "drafts are offered with the last committed token still to be computed"
        window = sequence.window if len(draws.tokens) > 1 else EMPTY_WINDOW
        children: dict[int, list[int]] = {}
        for draft, parent in enumerate(window.parents):
            if draft + 1 not in draws.undrawn:
                children.setdefault(parent, []).append(draft)
        kept: list[int] = []
        at = ROOT
        while at in children:
            following = _followed(sequence, draws, at + 1, children[at])
            if following is None:
                break
            kept.append(following)
            at = following
        committed = (*(window.tokens[draft] for draft in kept), draws.tokens[at + 1])
        return Decision(committed=committed, kept=tuple(kept))


def _followed(sequence: Sequence, draws: Draws, row: int, drafts: list[int]) -> int | None:
    """Of drafts after a row the one that the target draws, else the likeliest that is acceptable."""
    tokens = [sequence.window.tokens[draft] for draft in drafts]
    if draws.tokens[row] in tokens:
        return drafts[tokens.index(draws.tokens[row])]
    asked, place = sequence.request.lossy, draws.places[row]
    if asked is None or (asked.rule == "typical" and not is_random(place)):
        return None
    probabilities = distribution(draws.logits[row], place)
    if probabilities is None:
        return None
    of_drafts = probabilities[tokens]
    best = int(of_drafts.argmax())
    return drafts[best] if _accepts(asked, probabilities, float(of_drafts[best])) else None


def _accepts(asked: LossyAcceptance, probabilities: torch.Tensor, of_draft: float) -> bool:
    if asked.rule == "threshold":
        return of_draft > 0.0 and of_draft >= asked.threshold * float(probabilities.max())
    entropy = float(torch.special.entr(probabilities).sum())
    return of_draft > min(asked.epsilon, asked.delta * math.exp(-entropy))
