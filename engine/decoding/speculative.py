"""Verification of drafts: a draft stands if it equals what the target itself samples there.

Every token is drawn with the noise of its own place, so what is committed is what plain decoding would have
committed, at any temperature and whoever drafted (lossless; with one-token drafts exactly as many stand as
under rejection sampling, Leviathan 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.decoding.method import Decision, Draws

if TYPE_CHECKING:
    from scheduler.types import Sequence


class Speculative:
    def decide(self, sequence: Sequence, draws: Draws) -> Decision:
        assert draws.after_last, "drafts are offered with the last committed token still to be computed"
        drafts = sequence.window.tokens if len(draws.tokens) > 1 else ()
        agreed = 0
        while agreed < len(drafts) and drafts[agreed] == draws.tokens[agreed]:
            agreed += 1
        return Decision(committed=draws.tokens[: agreed + 1], num_window_kept=agreed)
