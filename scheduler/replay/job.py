"""One request while it is replayed."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from scheduler.replay.ticks import TICKS_PER_S, ticks

if TYPE_CHECKING:
    from scheduler.replay.ticks import TickCosts
    from scheduler.replay.trace import TraceRequest


class State(enum.Enum):
    WAITING = enum.auto()
    LOADING = enum.auto()  # has a place; some of its pages are on their way back to the device
    PREFILLING = enum.auto()  # has a place; more than the last token is to compute
    DECODING = enum.auto()  # has a place; computes one token in every step
    DONE = enum.auto()


class Job:
    """What a policy may know of it (`scheduler.policies.base.Work`), and where it stands.

    `num_output`, `computed`, `reached` and the service of a decoding job are those of step `since`;
    `settle` brings them up to date. Times are ticks.
    """

    __slots__ = (
        "arrival",
        "arrival_s",
        "aside_since",
        "attained",
        "attained_s",
        "computed",
        "device_pages",
        "disk_pages",
        "expected_s",
        "fcfs_s",
        "finished",
        "first_token",
        "host_pages",
        "is_aside",
        "level",
        "max_output",
        "num_expected",
        "num_left",
        "num_output",
        "number",
        "output_len",
        "pinned",
        "priority",
        "prompt_len",
        "reached",
        "since",
        "stamp",
        "state",
        "tenant",
    )

    def __init__(self, number: int, request: TraceRequest, max_output: int) -> None:
        self.number = number  # in order of arrival
        self.tenant = request.tenant
        self.priority = request.priority
        self.prompt_len = request.prompt_len
        self.output_len = request.output_len
        self.max_output = max_output
        self.arrival_s = request.arrival_s
        self.arrival = ticks(request.arrival_s)
        self.num_output = 0
        self.num_left = request.prompt_len  # prompt tokens never computed
        self.attained = 0
        self.attained_s = 0.0
        self.level = 0
        self.expected_s = 0.0
        self.fcfs_s = 0.0
        self.num_expected = 0  # tokens that it is expected to have in the end
        self.computed = 0  # leading tokens whose KV is on the device
        self.reached = 0  # the most ever computed
        self.since = 0
        self.stamp = 0  # of its one valid entry among what is due
        self.state = State.WAITING
        self.pinned = False  # was put aside for too long: goes before all others
        self.is_aside = False  # put aside, without a place again
        self.aside_since = -1  # put aside then, not served again yet
        self.device_pages = 0  # while it waits: full pages found there, leading ones first;
        self.host_pages = 0  # then these;
        self.disk_pages = 0  # then these
        self.first_token = -1
        self.finished = -1

    @property
    def known(self) -> int:
        """Tokens to have in the cache before its next output token."""
        return self.prompt_len + self.num_output

    @property
    def moved_pages(self) -> int:
        return self.host_pages + self.disk_pages

    def charge(self, amount: int) -> None:
        self.attained += amount
        self.attained_s = self.attained / TICKS_PER_S

    def settle(self, step: int, costs: TickCosts) -> None:
        """A decoding job had one token in each step since the last time."""
        count = step - self.since
        if count:
            known = self.prompt_len + self.num_output
            self.charge(costs.decoded(known, count))
            self.num_output += count
            self.computed = known + count - 1
            self.reached = max(self.reached, self.computed)
            self.since = step
