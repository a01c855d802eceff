"""The slow twin of `scheduler.replay.replica`: one step at a time, every list sorted anew, every page counted
from scratch, every token charged on its own. Nothing is shared with the fast one but the costs in ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.clock import Clock
from scheduler.lengths import Lengths
from scheduler.machine import Machine
from scheduler.planning import ASIDE_SHARE, OVERDUE_COST_SHARE
from scheduler.policies import Policy
from scheduler.replay.ticks import TickCosts, seconds, ticks
from scheduler.replay.trace import TraceRequest


@dataclass(eq=False)
class Item:
    number: int
    tenant: str
    priority: int
    prompt_len: int
    output_len: int
    max_output: int
    arrival_s: float
    num_output: int = 0
    attained: int = 0
    level: int = 0
    expected_s: float = 0.0
    fcfs_s: float = 0.0
    expected: int = 0
    computed: int = 0
    reached: int = 0
    state: str = "absent"
    pinned: bool = False
    is_aside: bool = False
    aside_since: int = -1
    device: int = 0
    host: int = 0
    disk: int = 0
    until: int = 0  # loading ends then
    change: int = 0  # num_output at which the level is asked for again
    first_token: int = -1
    finished: int = -1

    @property
    def num_left(self) -> int:
        return max(0, self.prompt_len - self.reached)

    @property
    def attained_s(self) -> float:
        return self.attained / 10**12

    @property
    def known(self) -> int:
        return self.prompt_len + self.num_output


class Naive:
    def __init__(
        self,
        machine: Machine,
        make: Callable[[Clock], Policy],
        requests: Sequence[TraceRequest],
        max_pause_s: float,
        growth_share: float,
        known_lengths: bool,
    ) -> None:
        self.machine = machine
        self.places = min(machine.max_num_seqs, machine.max_num_batched_tokens)
        self.costs = TickCosts.of(machine.costs, self.places)
        self.max_pause = ticks(max_pause_s)
        self.now = 0
        self.growth_share = growth_share
        self.policy = make(lambda: seconds(self.now))
        self.lengths = self.policy.lengths or Lengths()
        self.items = [
            Item(
                number=number,
                tenant=one.tenant,
                priority=one.priority,
                prompt_len=one.prompt_len,
                output_len=one.output_len,
                max_output=one.output_len if known_lengths else machine.max_model_len - one.prompt_len,
                arrival_s=one.arrival_s,
            )
            for number, one in enumerate(requests)
        ]
        self.preempted_for_place = self.preempted_for_pages = 0
        self.pages_out = self.pages_in = self.pages_lost = 0
        self.num_steps = self.computed_tokens = self.recomputed_tokens = self.longest_pause = 0
        self.link_free = 0

    def run(self) -> Naive:
        while any(item.state != "done" for item in self.items):
            self.take_in()
            self.plan()
            self.evict()
            if self.running():
                self.step()
                self.evict()
            else:
                self.now = min(
                    [ticks(item.arrival_s) for item in self.items if item.state == "absent"]
                    + [item.until for item in self.of("loading")]
                )
        return self

    # What there is

    def of(self, *states: str) -> list[Item]:
        return [item for item in self.items if item.state in states]

    def running(self) -> list[Item]:
        """With a place, and not about to get pages back."""
        return sorted(self.of("prefilling", "decoding"), key=self.rank)

    def seated(self) -> list[Item]:
        return self.of("prefilling", "decoding", "loading")

    def waiting(self) -> list[Item]:
        return sorted(self.of("waiting"), key=self.rank)

    def key(self, item: Item) -> float:
        return -math.inf if item.pinned else self.policy.key(item.level, item.arrival_s)

    def rank(self, item: Item) -> tuple[float, int]:
        return self.key(item), item.number

    def pages(self, tokens: int) -> int:
        return math.ceil(tokens / self.machine.page_size)

    def held(self) -> int:
        return sum(self.pages(item.known) for item in self.seated())

    def cached(self) -> int:
        return sum(item.device for item in self.of("waiting"))

    def host_free(self) -> int:
        return self.machine.host_pages - sum(item.host for item in self.of("waiting"))

    def disk_free(self) -> int:
        return self.machine.disk_pages - sum(item.disk for item in self.of("waiting"))

    # The rules

    def take_in(self) -> None:
        for item in self.of("absent"):
            if ticks(item.arrival_s) <= self.now:
                item.state = "waiting"
                self.policy.enter(item)
                item.level = self.policy.level(item)
                output = self.lengths.index(item.tenant, item.prompt_len).mean_left(0, item.max_output)
                item.expected = item.prompt_len + int(output * self.growth_share)
        for item in self.of("loading"):
            if item.until <= self.now:
                item.state = "prefilling"
        for item in self.items:
            if item.aside_since >= 0 and self.now - item.aside_since >= self.max_pause:
                item.pinned = True

    def plan(self) -> None:
        if self.policy.preemptive:
            self.seat_those_ahead()
        preempted = False
        while self.held() > self.machine.num_pages:
            self.put_aside(self.running()[-1])
            self.preempted_for_pages += 1
            preempted = True
        if not preempted:
            self.admit()

    def seat_those_ahead(self) -> None:
        claimed = 0
        stuck = False
        while claimed < self.machine.max_num_batched_tokens:
            queue = [item for item in self.waiting() if not (stuck and item.pinned)]
            others = [other for other in self.running() if not other.pinned]
            if not queue or not others or self.rank(others[-1]) < self.rank(queue[0]):
                return
            if stuck and len(self.seated()) < self.places:
                return
            victims = self.victims(queue[0], others)
            if victims is None and not queue[0].pinned:
                return
            if victims is None:
                stuck = True
                continue
            for victim in victims:
                self.put_aside(victim)
                self.preempted_for_place += 1
            claimed += self.seat(queue[0])

    def victims(self, item: Item, others: list[Item]) -> list[Item] | None:
        victims: list[Item] = []
        most_aside = max(1, self.machine.max_num_seqs // ASIDE_SHARE)
        allowed = most_aside - sum(other.is_aside for other in self.items)
        total = 0.0
        while not self.fits(item, victims):
            if not others or (len(victims) >= allowed and not item.pinned):
                return None
            victim = others.pop()
            cost = self.restoring(victim, item)
            total += cost
            if item.pinned and total > seconds(self.max_pause) / most_aside / OVERDUE_COST_SHARE:
                return None
            if not self.key(item) + cost < self.key(victim):
                return None
            victims.append(victim)
        return victims

    def fits(self, item: Item, victims: Sequence[Item] = ()) -> bool:
        left = [other for other in self.seated() if other not in victims]
        held = self.held() - sum(self.pages(victim.known) for victim in victims)
        margin = len(left) + 1 if left else 0
        return len(left) < self.places and held + self.pages(item.known) + margin <= self.machine.num_pages

    def restoring(self, victim: Item, item: Item) -> float:
        size = self.machine.page_size
        pages = (victim.known - 1) // size
        cost = self.costs.charge(pages * size, size)
        if self.machine.num_pages - self.held() - self.cached() < self.pages(item.known):
            again = self.costs.prefill(0, pages * size, self.machine.max_num_batched_tokens)
            if pages <= self.host_free():
                again = min(again, pages * self.costs.host_page)
            elif pages <= self.disk_free():
                again = min(again, pages * max(self.costs.host_page, self.costs.disk_page))
            cost += again
        return seconds(cost)

    def admit(self) -> None:
        left = self.machine.max_num_batched_tokens
        left -= sum(
            item.known - item.computed if item.state == "prefilling" else 1 for item in self.running()
        )
        while left > 0 and self.waiting() and self.fits(self.waiting()[0]):
            least = self.machine.page_size
            both = [*self.seated(), self.waiting()[0]]
            ends = sum(self.pages(max(one.known + least, one.expected)) for one in both)
            if len(both) > 1 and ends > self.machine.num_pages:
                return
            left -= self.seat(self.waiting()[0])

    def seat(self, item: Item) -> int:
        item.is_aside = False
        size = self.machine.page_size
        moved = item.host + item.disk
        duration = item.host * self.costs.host_page + item.disk * self.costs.disk_page
        budget = self.machine.max_num_batched_tokens
        if duration > self.costs.prefill(item.device * size, moved * size, budget):
            self.pages_lost += moved
            moved = 0
        item.computed = (item.device + moved) * size
        item.state = "loading" if moved else "prefilling"
        if moved:
            self.link_free = max(self.now, self.link_free) + duration
            item.until = self.link_free
            self.pages_in += moved
        item.device = item.host = item.disk = 0
        return 0 if moved else item.known - item.computed

    def put_aside(self, item: Item) -> None:
        item.device = item.computed // self.machine.page_size
        item.state = "waiting"
        item.is_aside = True
        if item.reached and item.aside_since < 0:
            item.aside_since = self.now

    def evict(self) -> None:
        while self.cached() and self.held() + self.cached() > self.machine.num_pages:
            item = [other for other in self.waiting() if other.device][-1]
            if self.host_free():
                item.host += 1
                self.pages_out += 1
            elif self.disk_free():
                item.disk += 1
                self.pages_out += 1
            else:
                self.pages_lost += 1
            item.device -= 1

    # The step

    def step(self) -> None:
        costs = self.costs
        decoding = self.of("decoding")
        left = self.machine.max_num_batched_tokens - len(decoding)
        few = self.machine.page_size
        chunks = sorted(
            self.of("prefilling"), key=lambda item: (item.known - item.computed > few, self.rank(item))
        )
        shares = []
        for item in chunks:
            share = min(left, item.known - item.computed)
            left -= share
            if share:
                shares.append((item, share))
        duration = costs.step + sum(costs.chunk(item.known - 1, 1) for item in decoding)
        for item, share in shares:
            duration += costs.chunk(item.computed, share)
            if item.aside_since >= 0:
                self.longest_pause = max(self.longest_pause, self.now - item.aside_since)
                item.aside_since = -1
        self.now += duration
        self.num_steps += 1
        for item in decoding:
            item.attained += costs.charge(item.known - 1, 1)
            item.num_output += 1
            item.computed = item.known - 1
            item.reached = max(item.reached, item.computed)
            self.computed_tokens += 1
        for item, share in shares:
            self.chunk_done(item, share)
        for item in decoding:
            if item.num_output == item.output_len:
                self.finish(item)
            elif item.num_output >= item.change:
                self.place(item)

    def chunk_done(self, item: Item, share: int) -> None:
        again = max(0, min(share, item.reached - item.computed))
        self.computed_tokens += share
        self.recomputed_tokens += again
        item.computed += share
        if share > again:
            item.attained += self.costs.charge(item.computed - (share - again), share - again)
            item.reached = item.computed
        if item.computed < item.known:
            if share > again:
                self.place(item)
            return
        if not item.num_output:
            item.first_token = self.now
        item.num_output += 1
        if item.num_output == item.output_len:
            self.finish(item)
        else:
            item.state = "decoding"
            self.place(item)

    def place(self, item: Item) -> None:
        item.level = self.policy.level(item)
        if item.state == "decoding":
            change = self.policy.next_change(item)
            item.change = (
                item.output_len if change >= item.output_len else max(item.num_output + 1, math.ceil(change))
            )

    def finish(self, item: Item) -> None:
        item.state = "done"
        item.finished = self.now
        if self.policy.lengths is None:
            self.lengths.observe(item.tenant, item.prompt_len, item.num_output, True)
        self.policy.learn(item, True)
        self.policy.leave(item)
