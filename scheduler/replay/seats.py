"""Who has a place on the simulated machine, and who waits.

The rules are those of `scheduler.planning`, at the start of each step. Left out is what needs the tokens
themselves (common prefixes, parking), and fairness between tenants, the reserve of pages, the share set apart
for a long head of the order, and victims by what they cost to restore (`victims` counts as "last"):

1. Seats. Under a preemptive policy waiting jobs that precede a running one get a place; if need be those of
   the last ones, as long as each victim's key is behind by more than the seconds it costs to restore it.
2. Pages. While the running jobs need more than there are, the last of them is put aside.
3. Shares. Each decoding job computes one token. The rest of the budget goes to jobs with a page of tokens or
   less to compute, then to chunks in policy order.
4. Leftovers. While tokens, places and pages are left, waiting jobs are seated in policy order; pages into
   which running ones are expected to grow (`growth_share`) are not left.

A job put aside leaves its full pages on the device until their room is needed, then on the host or the disk
if there is room. Once it has a place again, pages come back over one link that overlaps computing; it goes
on when they are there, and is not displaced before. What was lost, or is computed sooner than fetched, is
computed again. Who was put aside for longer than `max_pause_s` has the next place that comes free, or that
of one who is cheap to restore, and is not put aside for anyone's place again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.lengths import Lengths
from scheduler.planning import ASIDE_SHARE, overdue_may_cost_s
from scheduler.replay.job import Job, State
from scheduler.replay.memory import Memory
from scheduler.replay.queue import Queue
from scheduler.replay.ranking import Ranking
from scheduler.replay.ticks import TickCosts, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.clock import Clock
    from scheduler.machine import Machine
    from scheduler.policies.base import Policy
    from scheduler.replay.trace import TraceRequest


@dataclass(slots=True)
class Counts:
    """Of one machine over one replay. Times in ticks."""

    num_steps: int = 0
    num_events: int = 0
    busy: int = 0
    end: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    preempted_for_place: int = 0
    preempted_for_pages: int = 0
    longest_stream_pause: int = 0  # of a job that had delivered tokens
    longest_prefill_pause: int = 0  # of a job that had not


class Seats:
    """The state of the machine at the beginning of a step, and the plan for it.

    `make` makes the policy, given its clock. `growth_share` is the setting of that name. `known_lengths`
    tells the policy the true output lengths as `max_output`; else that is what the context length leaves.
    """

    def __init__(
        self,
        machine: Machine,
        make: Callable[[Clock], Policy],
        requests: Sequence[TraceRequest],
        max_pause_s: float,
        growth_share: float,
        known_lengths: bool,
    ) -> None:
        self._places = min(machine.max_num_seqs, machine.max_num_batched_tokens)
        self._budget = machine.max_num_batched_tokens
        self._costs = TickCosts.of(machine.costs, self._places)
        self._now = 0
        self._step = 0  # steps so far
        self.counts = Counts()
        self.memory = Memory(machine)
        self.jobs = [
            Job(
                number,
                request,
                request.output_len if known_lengths else machine.max_model_len - request.prompt_len,
            )
            for number, request in enumerate(requests)
        ]
        self._growth_share = growth_share
        self._overdue_may_cost_s = overdue_may_cost_s(max_pause_s, self._places)
        self._policy = make(lambda: seconds(self._now))
        self._lengths = self._policy.lengths or Lengths()
        self._waiting = Queue(self._policy, self.jobs)
        self._leavable = Ranking(self._policy, self.jobs, last=True)  # running ones that others may displace
        self._evictable = Ranking(self._policy, self.jobs, last=True)  # put aside, with pages on the device
        self._pinned: set[int] = set()  # numbers of those with a place
        self._seated: dict[int, Job] = {}  # whoever has a place
        self._prefilling: dict[int, Job] = {}
        self._num_decoding = 0
        self._known = 0  # tokens that the decoding jobs know together
        self._loading: deque[tuple[int, Job]] = deque()  # (until, who), in order of time
        self._num_aside = 0  # put aside, without a place again
        self._is_stale = True  # whether planning again may decide otherwise than the last time
        self._looked_at: set[int] = set()  # those that the last plan might have displaced
        self._paused: deque[tuple[int, Job]] = deque()  # (since, who), in order of time

    def _plan(self) -> bool:
        """Whether pages were short. Then nobody is admitted now, but maybe in the next step."""
        self._looked_at.clear()
        if self._policy.preemptive and self._waiting and len(self._seated):
            self._seat_those_ahead()
        short = False
        while self.memory.held > self.memory.num_pages:
            self.counts.preempted_for_pages += 1
            self._put_aside(self._last_running())
            short = True
        if not short and self._waiting:
            self._admit()
        self._evict()
        self._is_stale = short
        return short

    def _seat_those_ahead(self) -> None:
        claimed = 0
        past_pinned = False  # nobody makes room for them: places that come free are theirs
        while claimed < self._budget and not (past_pinned and not self._is_full):
            job = self._waiting.peek(past_pinned=past_pinned)
            if job is None:
                return
            last = self._leavable.peek()
            if last is None:
                return
            self._looked_at.add(last.number)
            if self._rank(last) < self._rank(job):
                return
            victims = self._victims(job)
            if victims is None and job.pinned:
                past_pinned = True
                continue
            if victims is None:
                return
            for victim in victims:
                self.counts.preempted_for_place += 1
                self._put_aside(victim)
            claimed += self._seat(job)

    def _rank(self, job: Job) -> tuple[float, int]:
        return self._key(job), job.number

    def _key(self, job: Job) -> float:
        return float("-inf") if job.pinned else self._policy.key(job.level, job.arrival_s)

    def _victims(self, job: Job) -> list[Job] | None:
        """Who must go so that it has a place and pages: the last ones. None if those that it may displace do
        not make the room."""
        victims: list[Job] = []
        pages = 0
        cost_s = 0.0
        allowed = max(1, self._places // ASIDE_SHARE) - self._num_aside
        while not self._fits(job, victims, pages):
            last = self._leavable.peek()
            if last is None or (len(victims) >= allowed and not job.pinned):
                break
            self._looked_at.add(last.number)
            restore_s = self._restore_s(last, job)
            cost_s += restore_s
            if job.pinned and cost_s > self._overdue_may_cost_s:
                break
            if not self._key(job) + restore_s < self._key(last):
                break
            victims.append(last)
            pages += self.memory.pages_for(self._known_by(last))
            self._leavable.remove(last)
        else:
            return victims
        for victim in victims:
            self._leavable.add(victim)
        return None

    def _restore_s(self, victim: Job, job: Job) -> float:
        """What it would cost to bring the victim back: a page of tokens again, and the rest of its pages from
        the host or the disk or computed again, if `job` needs their room. While a batch only decodes it never
        shrinks, so that what is not worthwhile now is not before the next event either."""
        memory, costs = self.memory, self._costs
        pages = (self._known_by(victim) - 1) // memory.page_size
        again = costs.charge(pages * memory.page_size, memory.page_size)
        if memory.free >= memory.pages_for(job.known):
            return seconds(again)
        computing = costs.prefill(0, pages * memory.page_size, self._budget)
        if pages <= memory.host_free:
            return seconds(again + min(pages * costs.host_page, computing))
        if pages <= memory.disk_free:
            return seconds(again + min(pages * max(costs.host_page, costs.disk_page), computing))
        return seconds(again + computing)

    def _known_by(self, job: Job) -> int:
        return job.known + (self._step - job.since if job.state is State.DECODING else 0)

    @property
    def _is_full(self) -> bool:
        return len(self._seated) >= self._places

    def _fits(self, job: Job, victims: Sequence[Job] = (), pages: int = 0) -> bool:
        """Whether there are a place and pages, one more for each to grow into, once the victims are gone."""
        running = len(self._seated) - len(victims)
        margin = running + 1 if running else 0
        needed = self.memory.pages_for(job.known) + margin
        return running < self._places and self.memory.held - pages + needed <= self.memory.num_pages

    def _last_running(self) -> Job:
        last = self._leavable.peek()
        return last if last is not None else self.jobs[max(self._pinned)]

    def _admit(self) -> None:
        left = self._budget - self._num_decoding
        left -= sum(job.known - job.computed for job in self._prefilling.values())
        while left > 0 and not self._is_full and (job := self._waiting.peek()) is not None:
            if not self._fits(job) or not self._will_fit(job):
                return
            left -= self._seat(job)

    def _will_fit(self, job: Job) -> bool:
        """Whether there will be pages for all that the job and those who run are expected to become."""
        if not self._seated:
            return True
        pages_for, size = self.memory.pages_for, self.memory.page_size
        promised = sum(
            pages_for(max(self._known_by(one) + size, one.num_expected)) for one in self._seated.values()
        )
        return promised + pages_for(max(job.known + size, job.num_expected)) <= self.memory.num_pages

    # Giving and taking

    def _seat(self, job: Job) -> int:
        """Tokens that it wants to compute now."""
        self._waiting.remove(job)
        self._evictable.remove(job)
        self._seated[job.number] = job
        self._num_aside -= job.is_aside
        job.is_aside = False
        moving = job.host_pages * self._costs.host_page + job.disk_pages * self._costs.disk_page
        size = self.memory.page_size
        computing = self._costs.prefill(job.device_pages * size, job.moved_pages * size, self._budget)
        moves = job.moved_pages > 0 and moving <= computing
        self.memory.seat(job, moves)
        if moves:
            job.state = State.LOADING
            begin = self._loading[-1][0] if self._loading else self._now
            self._loading.append((begin + moving, job))
            return 0
        self._begin_prefill(job)
        return job.known - job.computed

    def _begin_prefill(self, job: Job) -> None:
        self._is_stale = True
        job.state = State.PREFILLING
        self._prefilling[job.number] = job
        if job.pinned:
            self._pinned.add(job.number)
        else:
            self._leavable.add(job)

    def _leave(self, job: Job) -> None:
        """A running job no longer has a place. It is settled."""
        del self._seated[job.number]
        self.memory.held -= self.memory.pages_for(job.known)
        if job.state is State.DECODING:
            self._num_decoding -= 1
            self._known -= job.known
            self.memory.stop_growing(job.known, self._step)
            job.stamp += 1
        else:
            del self._prefilling[job.number]
        self._leavable.remove(job)
        self._pinned.discard(job.number)

    def _put_aside(self, job: Job) -> None:
        if job.state is State.DECODING:
            job.settle(self._step, self._costs)
        self._leave(job)
        self.memory.leave(job, job.computed)
        if job.reached and job.aside_since < 0:
            job.aside_since = self._now
            self._paused.append((self._now, job))
        self._num_aside += 1
        job.is_aside = True
        job.state = State.WAITING
        self._waiting.add(job)
        if job.device_pages and not job.pinned:
            self._evictable.add(job)

    def _evict(self) -> None:
        while self.memory.excess > 0:
            job = self._evictable.peek() or self._waiting.last_pinned_with_pages()
            assert job is not None, "cached pages belong to someone put aside"
            self.memory.evict(job)
            if not job.device_pages:
                self._evictable.remove(job)
