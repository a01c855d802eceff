"""Verification of drafts: a draft stands if it equals what the target itself samples there.

Every token is drawn with the noise of its own place, so what is committed is what plain decoding would have
committed, at any temperature and whoever drafted (lossless; with one-token drafts exactly as many stand as
under rejection sampling, Leviathan 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.decoding.method import Decision, Draws
from scheduler.types import EMPTY_WINDOW

if TYPE_CHECKING:
    from scheduler.types import Sequence


class Speculative:
    def decide(self, sequence: Sequence, draws: Draws) -> Decision:
        assert draws.after_last, "drafts are offered with the last committed token still to be computed"
        window = sequence.window if len(draws.tokens) > 1 else EMPTY_WINDOW
        draft_of = {
            place: draft for draft, place in enumerate(zip(window.parents, window.tokens, strict=True))
        }
        committed = [draws.tokens[0]]
        kept: list[int] = []
        at = -1
        while (draft := draft_of.get((at, committed[-1]))) is not None and draft + 1 not in draws.undrawn:
            kept.append(draft)
            committed.append(draws.tokens[draft + 1])
            at = draft
        return Decision(committed=tuple(committed), kept=tuple(kept))
