"""One token a step: the target's own sample after the last committed token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.decoding.method import Decision, Draws

if TYPE_CHECKING:
    from scheduler.types import Sequence


class Autoregressive:
    def decide(self, sequence: Sequence, draws: Draws) -> Decision:
        del sequence
        return Decision(committed=draws.tokens)
