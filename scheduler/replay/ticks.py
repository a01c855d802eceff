"""Time of the simulation as whole picoseconds, so that many steps taken at once end exactly where the same
steps taken one by one end."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

from scheduler.costs import num_pairs

if TYPE_CHECKING:
    from scheduler.costs import CostModel

TICKS_PER_S = 10**12


def ticks(seconds: float) -> int:
    return round(seconds * TICKS_PER_S)


def seconds(num_ticks: int) -> float:
    return num_ticks / TICKS_PER_S


@dataclass(frozen=True, slots=True)
class TickCosts:
    """A cost model in ticks. `share` is the part of `step` that a slice is charged."""

    step: int
    slice: int
    token: int
    context: int
    pair: int
    host_page: int
    disk_page: int
    share: int

    @staticmethod
    def of(costs: CostModel, places: int) -> TickCosts:
        return TickCosts(
            step=max(1, ticks(costs.step_s)),
            slice=ticks(costs.slice_s),
            token=ticks(costs.token_s),
            context=ticks(costs.context_s),
            pair=ticks(costs.pair_s),
            host_page=ticks(costs.host_page_s),
            disk_page=ticks(costs.disk_page_s),
            share=ticks(costs.step_s / places),
        )

    def chunk(self, start: int, num_tokens: int) -> int:
        """What a slice adds to a step: `num_tokens` from position `start` on."""
        pairs = num_pairs(start, num_tokens)
        return self.slice + self.token * num_tokens + self.context * (start + num_tokens) + self.pair * pairs

    def charge(self, start: int, num_tokens: int) -> int:
        """Service attributed for such a slice."""
        return self.share + self.chunk(start, num_tokens)

    def prefill(self, start: int, num_tokens: int, chunk: int) -> int:
        """Service attributed for known tokens, computed in slices of at most `chunk`."""
        num_slices = -(-num_tokens // chunk)
        reach = num_slices * start + chunk * (num_slices * (num_slices - 1) // 2) + num_tokens
        own = num_slices * (self.slice + self.share) + self.token * num_tokens
        return own + self.context * reach + self.pair * num_pairs(start, num_tokens)

    def decoded(self, known: int, num_tokens: int) -> int:
        """Service attributed for `num_tokens` outputs one by one, the first of which sees `known` tokens."""
        seen = num_tokens * known + num_tokens * (num_tokens - 1) // 2
        return num_tokens * (self.slice + self.share + self.token) + (self.context + self.pair) * seen

    def steps(self, num_steps: int, num_seqs: int, known: int) -> int:
        """How long steps last in which `num_seqs` sequences decode that see `known` tokens together in the
        first of them, and one more each in every further one."""
        seen = num_steps * known + num_seqs * (num_steps * (num_steps - 1) // 2)
        alike = num_steps * (self.step + num_seqs * (self.slice + self.token))
        return alike + (self.context + self.pair) * seen

    def steps_until(self, duration: int, num_seqs: int, known: int) -> int:
        """The least number of such steps, at least 1, that last `duration` or longer."""
        square = (self.context + self.pair) * num_seqs
        first = self.step + num_seqs * (self.slice + self.token) + (self.context + self.pair) * known
        linear = 2 * first - square
        # square k^2 + linear k >= 2 duration
        if square:
            count = (isqrt(linear * linear + 8 * square * max(0, duration)) - linear) // (2 * square)
        else:
            count = 2 * duration // linear
        count = max(1, count - 1)
        while self.steps(count, num_seqs, known) < duration:
            count += 1
        return count
