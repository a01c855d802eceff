"""The seam between ways to decode: the only place where they differ.

A method is a small object per sequence. After each step that computed the sequence's last committed token
and its window, it turns what the target says there into a decision: tokens to commit, window slots whose
KV stays, and the next window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from scheduler.types import EMPTY_WINDOW, Sequence, Window

if TYPE_CHECKING:
    import torch

    from engine.sampling.places import Place


class Draws(NamedTuple):
    """What the target says at the rows of this step: after the last committed token, then after each
    token of the window. The first of these is missing when an earlier step computed that token and
    nothing was committed since (`after_last` is False).

    tokens[r] is the target's own sample after row r, with the noise of that place: what plain decoding
    would commit there, if the window tokens that row r follows were right. Behind a draft that is not drawn,
    and stands only if it is, it may be the likeliest token instead. Rows of `undrawn` have no token: the
    request allows none there, and plain decoding would fail if it came so far.
    """

    after_last: bool
    tokens: tuple[int, ...]
    step_logits: torch.Tensor  # float32 [R, V] of all rows that were sampled, beginning at ...
    first_row: int
    places: tuple[Place, ...] = ()
    undrawn: frozenset[int] = frozenset()

    @property
    def logits(self) -> torch.Tensor:
        """float32 [rows, V]; it lives as long as the step, so a method that needs it later keeps a copy."""
        return self.step_logits[self.first_row : self.first_row + len(self.tokens)]


class Decision(NamedTuple):
    """Tokens to commit, which of the window's tokens keep their KV (those of the first committed tokens,
    in their order), and what is to be computed next.

    `logits`, float32 [n, V], chose the committed tokens (for log-probabilities); None = this step's draws
    did: the row after the last committed token, then those of the `kept` ones.
    """

    committed: tuple[int, ...]
    kept: tuple[int, ...] = ()
    window: Window = EMPTY_WINDOW
    logits: torch.Tensor | None = None


class DecodingMethod(Protocol):
    def decide(self, sequence: Sequence, draws: Draws) -> Decision:
        """`sequence` is as it was when the step was planned; it must not be changed. It may be asked again
        with the same draws: a step that fails is computed anew, in parts."""
        ...


MethodFactory = Callable[[], DecodingMethod]
