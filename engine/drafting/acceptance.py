"""How likely a draft is to be accepted, learned from what was: per drafter and kind, and per request.

Counts decay, so what was learned follows the traffic. What a request's own drafts did, against what was
expected of them, scales what is expected of its next ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.drafting.guess import ROOT

if TYPE_CHECKING:
    from collections.abc import Collection

    from engine.drafting.guess import Guess

DECAY = 0.995  # of what is known of a kind, with each trial
OWN_DECAY = 0.9  # of what is known of a request
OWN_WEIGHT = 4.0  # expected successes of a request that weigh as much as all that is known of the kind
PRIOR_TRIALS = 4.0
SUREST = 0.98
GRANTED_DECAY = 0.98  # of what is known of all granted drafts, with those of each sequence
FIRST_GRANTED = 20.0  # drafts that stood as expected, before anything is known
RELAXING = 0.001  # of what is known of granted drafts, back to that, with each step that grants none


@dataclass(slots=True)
class Tally:
    """Decayed counts: successes, and trials or what was expected of them."""

    trials: float = 0.0
    successes: float = 0.0

    def note(self, expected: float, successes: int, decay: float) -> None:
        self.trials = self.trials * decay + expected
        self.successes = self.successes * decay + successes


class Acceptance:
    """Keys of drafters are their names; of requests, sequence numbers."""

    def __init__(self) -> None:
        self._granted = Tally(FIRST_GRANTED, FIRST_GRANTED)
        self._kinds: dict[tuple[str, int], Tally] = {}
        self._own: dict[int, dict[str, Tally]] = {}

    def chances(self, seq_id: int, drafter: str, guess: Guess) -> list[float]:
        """Of each draft: the chance that it stands if the one that it follows does."""
        kinds = self._kinds
        own = self._own.get(seq_id, {}).get(drafter)
        scale = (OWN_WEIGHT + own.successes) / (OWN_WEIGHT + own.trials) if own else 1.0
        chances = []
        for kind, belief in zip(guess.kinds, guess.beliefs, strict=True):
            known = kinds.get((drafter, kind))
            chance = belief
            if known is not None:
                chance = (known.successes + PRIOR_TRIALS * belief) / (known.trials + PRIOR_TRIALS)
            chances.append(min(SUREST, chance * scale))
        return chances

    @property
    def sobriety(self) -> float:
        """By how much the chances of drafts that were granted were too high, a factor of at most 1: those are
        granted above all whose chances are overestimated."""
        return min(1.0, self._granted.successes / self._granted.trials)

    def note_granted(self, expected: float, num_stood: int) -> None:
        """Of drafts with so many expected to stand so many did."""
        self._granted.note(expected, num_stood, GRANTED_DECAY)

    def note_none_granted(self) -> None:
        """Of those that a step could have had. Whoever is too sober to try would never find out."""
        granted = self._granted
        granted.trials += RELAXING * (FIRST_GRANTED - granted.trials)
        granted.successes += RELAXING * (FIRST_GRANTED - granted.successes)

    def note(self, seq_id: int, drafter: str, guess: Guess, stood: Collection[int]) -> None:
        """Of the drafts of a guess, of all of which it is known, those numbered `stood` were right."""
        own = self._own.setdefault(seq_id, {}).setdefault(drafter, Tally())
        for draft, (parent, kind, belief) in enumerate(
            zip(guess.parents, guess.kinds, guess.beliefs, strict=True)
        ):
            if parent != ROOT and parent not in stood:
                continue  # what would have followed is not known
            success = draft in stood
            known = self._kinds.setdefault((drafter, kind), Tally())
            general = (known.successes + PRIOR_TRIALS * belief) / (known.trials + PRIOR_TRIALS)
            own.note(general, success, OWN_DECAY)
            known.note(1.0, success, DECAY)

    def release(self, seq_id: int) -> None:
        self._own.pop(seq_id, None)
