"""What a step costs: seconds predicted from a few constants of one machine and one model.

    step = step_s + sum over its slices of (slice_s + token_s * tokens + context_s * reach + pair_s * pairs)

`reach` is how many tokens of the sequence there are at the slice's end: attention loads each of them once
per slice, which is what decoding pays for. `pairs` counts every computed token with every token it sees,
which is what attention computes in a prefill. Service is *attributed*: a slice is charged its own cost and
a fixed part of `step_s`, not the time of the batch that it rode in, so what a sequence is charged does not
depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """All values in seconds and not negative. The defaults are of the order of a small model on two CPU
    cores; a running engine measures its own."""

    step_s: float = 0.03  # a step, whatever is in it
    slice_s: float = 0.002  # one more sequence in it
    token_s: float = 0.001  # one more token in it
    context_s: float = 0.0  # one more token for a slice to look back at, however many look
    pair_s: float = 5e-7  # one token that looks at one other
    host_page_s: float = 1e-4  # a page copied between device and host
    disk_page_s: float = 5e-4  # a page written to the disk file or read from it

    def slice(self, start: int, num_tokens: int) -> float:
        """Seconds that a slice adds to a step: `num_tokens` from position `start` on."""
        if not num_tokens:
            return 0.0
        pairs = num_pairs(start, num_tokens)
        own = self.slice_s + self.token_s * num_tokens
        return own + self.context_s * (start + num_tokens) + self.pair_s * pairs

    def step(self, slices: Iterable[tuple[int, int]]) -> float:
        """Seconds of a step with these slices, each (start, number of tokens)."""
        return self.step_s + sum(self.slice(start, num_tokens) for start, num_tokens in slices)

    def prefill(self, start: int, num_tokens: int, chunk: int, places: int) -> float:
        """Attributed seconds of computing known tokens in steps of at most `chunk`."""
        num_slices = -(-num_tokens // chunk)
        pairs = num_pairs(start, num_tokens)
        # All slices but the last end after a whole chunk.
        reach = num_slices * start + chunk * (num_slices * (num_slices - 1) // 2) + num_tokens
        per_slice = self.slice_s + self.step_s / places
        own = num_slices * per_slice + self.token_s * num_tokens
        return own + self.context_s * reach + self.pair_s * pairs

    def decode(self, context: int, places: int) -> float:
        """Attributed seconds of one output token after `context` others, in a batch of `places`."""
        own = self.slice_s + self.step_s / places + self.token_s
        return own + (self.context_s + self.pair_s) * (context + 1)


def num_pairs(start: int, num_tokens: int) -> int:
    """Tokens that look times tokens that each of them sees, itself included."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2
