"""How likely a draft is to be accepted, learned from what was: per drafter and evidence, and per request.

Counts decay, so what was learned follows the traffic. A request's own experience outweighs what others had
as it grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.drafting.guess import Guess

DECAY = 0.995  # of what is known of a class, with each trial
OWN_DECAY = 0.9  # of what is known of a request
OWN_WEIGHT = 4.0  # trials of a request that weigh as much as all that is known of the class
PRIOR_TRIALS = 4.0
PRIOR_CHANCE = 0.6  # hopeful: what is never tried is never learned
FIRST, EARLY, LATE = 0, 1, 2  # depths: 0; 1 to 3; 4 and more


@dataclass(slots=True)
class Tally:
    """Decayed counts of trials and successes."""

    trials: float = 0.0
    successes: float = 0.0

    def note(self, success: bool, decay: float) -> None:
        self.trials = self.trials * decay + 1.0
        self.successes = self.successes * decay + success


class Acceptance:
    """Keys of drafters are their names; of requests, sequence numbers."""

    def __init__(self) -> None:
        self._classes: dict[tuple[str, int, int], Tally] = {}  # drafter, evidence, depth class
        self._own: dict[int, dict[str, Tally]] = {}

    def chances(self, seq_id: int, drafter: str, guess: Guess) -> tuple[float, ...]:
        """The chance of each prefix of the line to be accepted whole."""
        chance, chances = 1.0, []
        by_depth = [self._chance(seq_id, drafter, guess.evidence, depth) for depth in (FIRST, EARLY, LATE)]
        for depth in range(len(guess.tokens)):
            chance *= by_depth[_depth_class(depth)]
            chances.append(chance)
        return tuple(chances)

    def note(self, seq_id: int, drafter: str, evidence: int, num_drafts: int, num_accepted: int) -> None:
        """Of `num_drafts` that were verified the first `num_accepted` stood."""
        own = self._own.setdefault(seq_id, {}).setdefault(drafter, Tally())
        for depth in range(min(num_drafts, num_accepted + 1)):
            accepted = depth < num_accepted
            key = (drafter, evidence, _depth_class(depth))
            self._classes.setdefault(key, Tally()).note(accepted, DECAY)
            own.note(accepted, OWN_DECAY)

    def release(self, seq_id: int) -> None:
        self._own.pop(seq_id, None)

    def _chance(self, seq_id: int, drafter: str, evidence: int, depth: int) -> float:
        known = self._classes.get((drafter, evidence, depth)) or Tally()
        successes = known.successes + PRIOR_TRIALS * PRIOR_CHANCE
        general = successes / (known.trials + PRIOR_TRIALS)
        own = self._own.get(seq_id, {}).get(drafter)
        if own is None:
            return general
        return (general * OWN_WEIGHT + own.successes) / (OWN_WEIGHT + own.trials)


def _depth_class(depth: int) -> int:
    return FIRST if depth == 0 else EARLY if depth < 4 else LATE
