"""The interface of an order of service.

Every policy is a multi-level queue: a sequence has a level, within a level the earliest arrival is first,
and `key` says which of the levels' first ones goes first. A sequence gets its level when it comes, and
another one when it was served, or when pages that it was parked for have come or will not: while it waits
in the queue its level stays, whatever is learned meanwhile. The key of a level may change at any time (a
ratio that grows with waiting, a knob that adapts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from scheduler.lengths import Lengths


class Work(Protocol):
    """What a policy may know of a sequence; and two notes that it may keep there."""

    expected_s: float  # service that it was expected to need when it entered; 0 = it is not there
    fcfs_s: float  # how long it would have been in the system under first come first served, about

    @property
    def tenant(self) -> str: ...

    @property
    def priority(self) -> int: ...

    @property
    def arrival_s(self) -> float: ...

    @property
    def prompt_len(self) -> int: ...

    @property
    def num_output(self) -> int:
        """Output tokens committed so far."""
        ...

    @property
    def max_output(self) -> int:
        """The most output tokens that it may have."""
        ...

    @property
    def num_left(self) -> int:
        """Known tokens that were never computed for it: its prefill. 0 once it only decodes. What a
        preemption makes it compute again does not count: that is not its fault."""
        ...

    @property
    def attained_s(self) -> float:
        """Service attributed to it so far."""
        ...

    @property
    def level(self) -> int:
        """Where it is now; 0 before it was placed."""
        ...


class Policy(Protocol):
    @property
    def preemptive(self) -> bool:
        """Whether a waiting sequence may take the place or the pages of a running one it precedes."""
        ...

    @property
    def max_head_start_s(self) -> float:
        """Nobody in the queue is overtaken by someone of the same tenant who arrived later by more than
        this, but for one that was put aside for too long."""
        ...

    @property
    def gamma(self) -> float:
        """Per second, where the policy weighs waiting against size; else 0."""
        ...

    @property
    def lengths(self) -> Lengths | None:
        """The output lengths that it learns from, and feeds; None if it needs none."""
        ...

    def enter(self, work: Work) -> None:
        """A sequence begins to wait for its first place."""
        ...

    def leave(self, work: Work) -> None:
        """It is gone, however it ended. Ones that never entered are ignored."""
        ...

    def level(self, work: Work) -> int:
        """Where the sequence belongs now; asked before it entered too. The lower, the sooner it is served."""
        ...

    def next_change(self, work: Work) -> float:
        """For a sequence that only decodes: the `num_output` from which its level may be another
        (more than it has now; infinity if never). Until then nobody asks, so it may come a little late."""
        ...

    @property
    def epoch(self) -> float:
        """Another number when keys may have changed since it was last looked at."""
        ...

    def key(self, level: int, arrival_s: float) -> float:
        """Smaller goes first. Within a level it grows with `arrival_s`."""
        ...

    def learn(self, work: Work, natural: bool) -> None:
        """A sequence ended. `natural`: its text ended by itself (a stop token, a stop string); else it
        was cut (a limit, a client that left), and would have been longer."""
        ...
