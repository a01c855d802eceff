"""The seam of token masks: which tokens may come next, as grammars and the like know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from scheduler.types import Sequence


class TokenMask(Protocol):
    """Bound to one sequence, which it reads and never changes; it lives as long as the sequence does."""

    def allowed(self, drafted: tuple[int, ...]) -> torch.Tensor | None:
        """bool [vocab]: the tokens that may follow the committed ones and then `drafted`; None = all.

        `drafted` is a path through a tree of drafts, and the same step asks about many, in any order: nothing
        of it is committed by asking. What is committed since is seen in the sequence, and may be none of what
        was drafted. So following a draft and taking it back is one and the same: the mask keeps its state
        after the committed tokens, and goes on from there to answer. Drafts may be tokens that the mask
        forbids, as whoever guesses knows nothing of it; they are never drawn, and what is answered after
        them means nothing. A mask that allows no token, or raises, ends its sequence with an error, once
        plain decoding would have met it there.
        """
        ...


MaskOf = Callable[["Sequence"], TokenMask | None]  # the mask of a new sequence; None: it may say anything


def unmasked(sequence: Sequence) -> None:
    """Every sequence may say anything."""
