"""The seam between ways to decode: the only place where they differ.

A method is a small object per sequence. After each step that computed the sequence's last committed token
and its window, it turns what the target says there into a decision: tokens to commit, window slots whose
KV stays, and the next window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from scheduler.types import EMPTY_WINDOW, Sequence, Window


@dataclass(frozen=True, slots=True)
class Draws:
    """What the target says at the last committed token (row 0) and at each window token (rows 1..).

    tokens[r] is the target's own sample after row r, with the noise of that place: it is what plain
    decoding would commit there, if the window tokens before it were right. logits: float32 [1 + w, V].
    """

    tokens: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Decision:
    """`rows[k]` is the row that chose `committed[k]`; the first `num_window_kept` window slots keep KV."""

    committed: tuple[int, ...]
    rows: tuple[int, ...]
    num_window_kept: int = 0
    window: Window = EMPTY_WINDOW


class DecodingMethod(Protocol):
    def decide(self, sequence: Sequence, draws: Draws) -> Decision:
        """`sequence` is as it was when the step was planned; it must not be changed."""
        ...


MethodFactory = Callable[[], DecodingMethod]
