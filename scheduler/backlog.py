"""How much service the accepted sequences are expected to need still, level by level.

Attributed service adds up to the time of full batches, so the backlog of those ahead is about the time that
a newcomer waits. The estimate is a sum kept up to date as service is given: nothing is walked through.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.config import SchedulerConfig
    from scheduler.costs import CostModel
    from scheduler.lengths import Lengths
    from scheduler.types import Sequence

CHARITY = 0.1  # a deadline is called impossible if even this share of the expected output would miss it


class Backlog:
    def __init__(self, costs: CostModel, config: SchedulerConfig, lengths: Lengths) -> None:
        self._costs = costs
        self._chunk, self._places = config.max_num_batched_tokens, config.max_num_seqs
        self._lengths = lengths
        self._by_level: dict[int, float] = defaultdict(float)
        self._counted: dict[int, int] = {}  # the level under which a sequence's share is counted

    @property
    def total_s(self) -> float:
        return max(0.0, sum(self._by_level.values()))

    def ahead_s(self, level: int) -> float:
        """Of those at the level or above: they precede a newcomer there, nearly all of them."""
        return max(0.0, sum(seconds for number, seconds in self._by_level.items() if number <= level))

    def add(self, sequence: Sequence) -> None:
        """The sequence came, or is looked at again: it was held back till now."""
        self.remove(sequence)
        sequence.backlog_s = self._service_s(sequence, 1.0, self._places)
        self._by_level[sequence.level] += sequence.backlog_s
        self._counted[sequence.seq_id] = sequence.level

    def served(self, sequence: Sequence, seconds: float) -> None:
        """The sequence was served, and may have changed its level."""
        before = self._counted[sequence.seq_id]
        left_s = max(0.0, sequence.backlog_s - seconds)
        if before == sequence.level:
            self._by_level[before] += left_s - sequence.backlog_s
        else:
            self._by_level[before] -= sequence.backlog_s
            self._by_level[sequence.level] += left_s
            self._counted[sequence.seq_id] = sequence.level
        sequence.backlog_s = left_s

    def remove(self, sequence: Sequence) -> bool:
        """-> whether it was there: one that ended at once never came"""
        level = self._counted.pop(sequence.seq_id, None)
        if level is None:
            return False
        self._by_level[level] -= sequence.backlog_s
        if not self._counted:
            self._by_level.clear()  # what is left are rounding errors
        return True

    def alone_s(self, sequence: Sequence) -> float:
        """The least wall time of a newcomer, in a batch of its own and with little output."""
        return self._service_s(sequence, CHARITY, places=1)

    def expected_output(self, sequence: Sequence) -> float:
        """Tokens that it is still to have, by what was learned from others and its own limit."""
        index = self._lengths.index(sequence.tenant, sequence.prompt_len)
        return index.mean_left(sequence.num_output, sequence.max_output)

    def _service_s(self, sequence: Sequence, share: float, places: int) -> float:
        """Attributed seconds of its prefill and of a share of the output expected of it, in batches of
        `places`."""
        left, output = sequence.num_left, self.expected_output(sequence) * share
        prefill_s = self._costs.prefill(sequence.num_known - left, left, self._chunk, places)
        return prefill_s + output * self._costs.decode(sequence.prompt_len, places)
