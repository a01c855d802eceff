"""Orders of service behind one interface.

A policy orders sequences by a time and a number, smaller first. The order of a sequence changes only
when it is served, so it is constant while the sequence waits, and a waiting queue can be a heap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from scheduler.agenda import Order
    from scheduler.config import SchedulerConfig
    from scheduler.types import Sequence


class Policy(Protocol):
    @property
    def preemptive(self) -> bool:
        """Whether a waiting sequence may take the place or the pages of a running one it precedes."""
        ...

    @property
    def num_levels(self) -> int: ...

    @property
    def max_head_start_s(self) -> float:
        """Nobody is overtaken by someone who arrived later by more than this."""
        ...

    def enter(self, sequence: Sequence, num_cached: int) -> None:
        """A sequence is about to wait for the first time; `num_cached` of its tokens can be found."""
        ...

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """A step computed `num_tokens` of the sequence that it had not computed before."""
        ...

    def order(self, sequence: Sequence) -> Order: ...


class FirstComeFirstServed:
    preemptive = False
    num_levels = 1
    max_head_start_s = 0.0

    def enter(self, sequence: Sequence, num_cached: int) -> None:
        pass

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        pass

    def order(self, sequence: Sequence) -> Order:
        return sequence.request.arrival_s, sequence.seq_id


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds that a slice costs. A placeholder for a cost model measured on the running machine: only
    the ratio of the two and their relation to the quantum matter to the order."""

    token_s: float = 0.001
    step_s: float = 0.005

    def of(self, num_tokens: int) -> float:
        return self.token_s * num_tokens + self.step_s if num_tokens else 0.0


class FeedbackQueue:
    """Skip-join multi-level feedback queue with bounded head starts (after FastServe, arXiv:2305.05920).

    The work of a sequence is the service attributed to it so far and the predicted cost of the known
    tokens it still has to compute. Level k covers work up to `quantum_s * 2**k`; a sequence joins
    where its prefill puts it and only ever sinks. The order is arrival minus the head start of the
    level, which falls evenly from `max_head_start_s` at level 0 to none at the lowest level.

    What a preemption makes a sequence compute again is not its fault: it is neither predicted nor
    charged.
    """

    preemptive = True

    def __init__(
        self, quantum_s: float, num_levels: int, max_head_start_s: float, cost: LinearCost | None = None
    ) -> None:
        self.num_levels = num_levels
        self.max_head_start_s = max_head_start_s if num_levels > 1 else 0.0
        self._bounds_s = tuple(quantum_s * 2.0**level for level in range(num_levels))
        lowest = max(1, num_levels - 1)
        self._head_starts_s = tuple(
            self.max_head_start_s * (lowest - level) / lowest for level in range(num_levels)
        )
        self._cost = cost or LinearCost()

    def enter(self, sequence: Sequence, num_cached: int) -> None:
        self._sink(sequence, len(sequence.tokens) - num_cached)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.attained_s += self._cost.of(num_tokens)
        self._sink(sequence, len(sequence.tokens) - sequence.num_reached)

    def order(self, sequence: Sequence) -> Order:
        return sequence.request.arrival_s - self._head_starts_s[sequence.level], sequence.seq_id

    def _sink(self, sequence: Sequence, num_left: int) -> None:
        work_s = sequence.attained_s + self._cost.of(num_left)
        while sequence.level < self.num_levels - 1 and work_s > self._bounds_s[sequence.level]:
            sequence.level += 1


def make_policy(config: SchedulerConfig) -> Policy:
    """Raises ValueError for a name that is no policy."""
    if config.policy == "fcfs":
        return FirstComeFirstServed()
    if config.policy == "mlfq":
        return FeedbackQueue(config.mlfq_quantum_s, config.mlfq_levels, config.mlfq_max_head_start_s)
    raise ValueError(f"scheduler.policy is {config.policy!r}; it must be mlfq or fcfs")
