"""Whose logits a row holds, and what is known there when its token is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from engine.sampling.processors import LogitsProcessor
    from scheduler.types import SamplingParams, Sequence


class Place(NamedTuple):
    """One row to sample. `drafted` are window tokens that stand between the committed ones and here.

    `after`: how many rows before this one the row lies whose draw decides: if that is not the last of
    `drafted`, nobody needs a draw here. 0: it is needed.
    """

    sequence: Sequence
    drafted: tuple[int, ...] = ()
    processor: LogitsProcessor | None = None  # None: the logits are drawn from as they are
    after: int = 0

    @property
    def params(self) -> SamplingParams:
        return self.sequence.request.sampling

    @property
    def number(self) -> int:
        """Which output token is chosen here, from 0: the place in the noise."""
        return self.sequence.num_output + len(self.drafted)
