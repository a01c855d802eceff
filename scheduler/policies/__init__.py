"""Orders of service behind one interface (base.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.policies.base import Policy
from scheduler.policies.learned import LearnedFeedbackQueue
from scheduler.policies.simple import (
    FirstComeFirstServed,
    HighestResponseRatioNext,
    Priority,
    ShortestRemainingFirst,
)
from scheduler.policies.static import StaticFeedbackQueue

if TYPE_CHECKING:
    from scheduler.clock import Clock
    from scheduler.config import SchedulerConfig
    from scheduler.costs import CostModel
    from scheduler.lengths import Lengths

__all__ = ["Policy", "make_policy"]


def make_policy(config: SchedulerConfig, costs: CostModel, clock: Clock, lengths: Lengths) -> Policy:
    """Raises ValueError for a name that is no policy."""
    chunk, places = config.max_num_batched_tokens, config.max_num_seqs
    match config.policy:
        case "mlfq":
            return LearnedFeedbackQueue(
                costs, chunk, places, config.head_start_gamma, config.max_head_start_s, lengths
            )
        case "mlfq-static":
            return StaticFeedbackQueue(
                config.static_quantum_s,
                config.static_levels,
                config.static_max_head_start_s,
                costs,
                chunk,
                places,
            )
        case "fcfs":
            return FirstComeFirstServed()
        case "priority":
            return Priority()
        case "hrrn":
            return HighestResponseRatioNext(costs, chunk, places, clock)
        case "srpt":
            return ShortestRemainingFirst(costs, chunk, places)
    raise ValueError(f"scheduler.policy is {config.policy!r}, which is no policy")
