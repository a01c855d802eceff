"""Which layers a draft skips, searched while serving (as SWIFT does: Xia 2024, arXiv 2410.06916).

A set of skipped layers is worth what drafting with it gains: of tokens that it gets right at a rate `a`, each
for a share `c` of a step, k drafts give (1 + a + .. + a^k) / (1 + k c) tokens for the time of one (Leviathan
2023), with the best k. One set is the best so far; a proposal is tried beside it, on the same tokens, and
takes its place if it is worth more. Proposals are small steps from the best (what helped before is likelier),
sometimes a leap; where nothing is right, half of the layers come back. No torch here.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

TRIAL_TOKENS = 64  # before a proposal is decided on
HOPELESS_TOKENS = 24  # after which one that is far behind is given up
FAR_BEHIND = 0.7
MARGIN = 1.02  # worth of a proposal, in that of the best: else chance would move it about
LEAP_SHARE = 0.15  # of the proposals
LONGEST_DRAFT = 12
WORTHLESS = 0.25
_SURPRISE = 0.2  # how far an untried layer's effect may be from what is known of it
_FORGETTING = 0.8  # of a layer's effect, with each proposal that changes it


class LayerSearch:
    """`skipped`: the best set so far. The first and the last layer are never in it."""

    def __init__(
        self,
        num_layers: int,
        *,
        head_layers: float = 0.0,
        skipped: Iterable[int] | None = None,
        seed: int = 0,
    ) -> None:
        """`head_layers`: what choosing a token costs, in layers. `skipped`: to begin with; by default every
        second one of the middle."""
        self.num_layers = num_layers
        self.head_layers = head_layers
        self.middle = range(1, num_layers - 1)
        self.skipped = frozenset(self.middle[1::2] if skipped is None else skipped)
        assert self.skipped <= set(self.middle), "the first and the last layer are always computed"
        self.num_rejected = 0  # proposals in a row
        self._random = random.Random(seed)
        self._effects = [0.0] * num_layers  # of computing the layer, on the rate of tokens got right
        self._num_tries = [0] * num_layers
        self._is_lost = False  # the best set gets next to nothing right
        self._proposal: frozenset[int] | None = None
        self._tokens = self._right = self._right_of_proposal = 0

    def kept(self, skipped: frozenset[int]) -> tuple[int, ...]:
        """The layers that are computed."""
        return tuple(layer for layer in range(self.num_layers) if layer not in skipped)

    def share(self, skipped: frozenset[int]) -> float:
        """What a draft costs, in steps."""
        computed = self.num_layers - len(skipped) + self.head_layers
        return computed / (self.num_layers + self.head_layers)

    def proposal(self) -> frozenset[int] | None:
        """The set on trial; None where there is nothing to choose."""
        if self._proposal is None and len(self.middle) > 0:
            self._proposal = self._propose()
            self._tokens = self._right = self._right_of_proposal = 0
        return self._proposal

    def note(self, tokens: int, right: int, right_of_proposal: int) -> None:
        """Of so many tokens the best set and the proposal got so many right."""
        if self._proposal is None:
            return
        self._tokens += tokens
        self._right += right
        self._right_of_proposal += right_of_proposal
        best = self.worth(self.skipped, self._right / self._tokens)
        tried = self.worth(self._proposal, self._right_of_proposal / self._tokens)
        if self._tokens >= TRIAL_TOKENS or (self._tokens >= HOPELESS_TOKENS and tried < FAR_BEHIND * best):
            self._decide(best, tried)

    def worth(self, skipped: frozenset[int], rate: float) -> float:
        """Above 1: tokens in the time of one, with drafts of the best length. Below, drafting does not pay,
        and a better rate comes before a smaller share: sets that pay are found from the set that skips
        nothing and is always right."""
        share = self.share(skipped)
        if rate <= share:
            return rate
        tokens, chance, best = 1.0, 1.0, 1.0
        for length in range(1, LONGEST_DRAFT + 1):
            chance *= rate
            tokens += chance
            best = max(best, tokens / (1 + length * share))
        return best

    def _decide(self, best: float, tried: float) -> None:
        proposal = self._proposal
        assert proposal is not None, "nothing is on trial"
        changed = proposal ^ self.skipped
        gained = (self._right_of_proposal - self._right) / self._tokens / len(changed)
        for layer in changed:
            effect = -gained if layer in proposal else gained
            self._effects[layer] += (1 - _FORGETTING) * (effect - self._effects[layer])
            self._num_tries[layer] += 1
        # Where neither gets much right, the way out is to skip less.
        self._is_lost = max(best, tried) < WORTHLESS
        fewer = self._is_lost and tried >= FAR_BEHIND * best and len(proposal) < len(self.skipped)
        if tried > best * MARGIN or fewer:
            self.skipped = proposal
            self.num_rejected = 0
        else:
            self.num_rejected += 1
        self._proposal = None

    def _propose(self) -> frozenset[int]:
        """Another set than the best."""
        if self._is_lost and self.skipped:
            return frozenset(self._random.sample(sorted(self.skipped), len(self.skipped) // 2))
        if self._random.random() < LEAP_SHARE and len(self.skipped) not in (0, len(self.middle)):
            leap = frozenset(self._random.sample(self.middle, len(self.skipped)))
            if leap != self.skipped:
                return leap
        computed = [layer for layer in self.middle if layer not in self.skipped]
        ways = []  # layers to skip, layers to compute
        if computed:
            ways.append((1, 0))
        if self.skipped:
            ways.append((0, 1))
        if computed and self.skipped:
            ways.append((1, 1))
        fewer, more = self._random.choice(ways)
        guessed = {layer: self._guessed_effect(layer) for layer in self.middle}
        to_skip = sorted(computed, key=guessed.__getitem__)[:fewer]
        to_compute = sorted(self.skipped, key=guessed.__getitem__, reverse=True)[:more]
        return (self.skipped | set(to_skip)) - set(to_compute)

    def _guessed_effect(self, layer: int) -> float:
        """Drawn from what is known of it (Thompson sampling): untried layers come up as well as good ones."""
        doubt = _SURPRISE / (1 + self._num_tries[layer]) ** 0.5
        return self._random.gauss(self._effects[layer], doubt)
