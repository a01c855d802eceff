"""One simulated machine: who computes what in each step, and how long the steps last.

Its rules are those of `scheduler.planning`, at the start of each step:

1. Seats. Under a preemptive policy waiting jobs that precede a running one get a place; if need be those of
   the last ones, as long as each victim's key is behind by more than the seconds it costs to restore it.
2. Pages. While the running jobs need more than there are, the last of them is put aside.
3. Shares. Each decoding job computes one token. The rest of the budget goes to jobs with a page of tokens or
   less to compute, then to chunks in policy order.
4. Leftovers. While tokens, places and pages are left, waiting jobs are seated in policy order.

A job put aside leaves its full pages on the device until their room is needed, then on the host or the disk
if there is room. Once it has a place again, pages come back over one link that overlaps computing; it goes
on when they are there, and is not displaced before. What was lost, or is computed sooner than fetched, is
computed again. Who was put aside for longer than `max_pause_s` goes before all others, and is not put aside
for anyone's place again.

While nobody has a prompt to compute, all running jobs advance by one token per step, and nothing can change
before the next arrival, end, change of a level or shortage of pages: the steps up to there are one event.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from scheduler.replay.job import Job, State
from scheduler.replay.memory import Memory
from scheduler.replay.queue import Queue
from scheduler.replay.ranking import Ranking
from scheduler.replay.ticks import TickCosts, seconds, ticks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

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

    @property
    def computed_again(self) -> float:
        """Tokens computed twice, per token computed."""
        return self.recomputed_tokens / max(1, self.computed_tokens)


class Replica:
    """`make` gives the policy its clock. `known_lengths` tells it the true output lengths as `max_output`;
    otherwise that is what the context length leaves."""

    def __init__(
        self,
        machine: Machine,
        make: Callable[[Clock], Policy],
        requests: Sequence[TraceRequest],
        *,
        max_pause_s: float,
        known_lengths: bool = False,
        on_finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._places = min(machine.max_num_seqs, machine.max_num_batched_tokens)
        self._budget = machine.max_num_batched_tokens
        self._costs = TickCosts.of(machine.costs, self._places)
        self._max_pause = ticks(max_pause_s)
        self._on_finish = on_finish
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
        self._policy = make(lambda: seconds(self._now))
        self._arrivals = deque(self.jobs)
        self._waiting = Queue(self._policy, self.jobs)
        self._leavable = Ranking(self._policy, self.jobs, last=True)  # running ones that others may displace
        self._evictable = Ranking(self._policy, self.jobs, last=True)  # put aside, with pages on the device
        self._pinned: set[int] = set()  # numbers of those with a place
        self._prefilling: dict[int, Job] = {}
        self._num_decoding = 0
        self._known = 0  # tokens that the decoding jobs know together
        self._due: list[tuple[int, int, int]] = []  # (step, number, stamp) of ends and changes of level
        self._paused: deque[tuple[int, Job]] = deque()  # (since, who), in order of time
        self._loading: deque[tuple[int, Job]] = deque()  # (until, who), in order of time
        self._is_stale = True  # whether planning again may decide otherwise than the last time
        self._looked_at: set[int] = set()  # those that the last plan might have displaced
        self._num_left = len(self.jobs)

    def run(self) -> Replica:
        """To the end of the last request."""
        while self._num_left:
            self.counts.num_events += 1
            self._take_in()
            short = self._is_stale and self._plan()
            if self._prefilling:
                self._compute_chunks()
            elif self._num_decoding:
                self._decode(1 if short else None)
            else:
                self._now = self._next_event()
                continue
            self._settle_due()
            self._evict()
        self.counts.end = self._now
        return self

    def wait_s(self, job: Job) -> float:
        """How much longer it took than on an empty machine."""
        num_chunks = -(-job.prompt_len // self._budget)
        alone = num_chunks * (self._costs.step - self._costs.share)
        alone += self._costs.prefill(0, job.prompt_len, self._budget)
        alone += self._costs.steps(job.output_len - 1, 1, job.prompt_len + 1)
        return seconds(job.finished - job.arrival - alone)

    # What comes from outside

    def _take_in(self) -> None:
        now = self._now
        while self._arrivals and self._arrivals[0].arrival <= now:
            job = self._arrivals.popleft()
            job.level = self._policy.level(job)
            self._waiting.add(job)
            self._is_stale = True
        while self._loading and self._loading[0][0] <= now:
            job = self._loading.popleft()[1]
            self._begin_prefill(job)
        while self._paused and self._is_overdue(*self._paused[0]):
            since, job = self._paused.popleft()
            if job.aside_since == since:
                self._pin(job)

    def _is_overdue(self, since: int, job: Job) -> bool:
        return job.aside_since != since or self._now >= since + self._max_pause

    def _pin(self, job: Job) -> None:
        job.pinned = True
        self._is_stale = True
        if job.state is State.WAITING:
            self._waiting.remove(job)
            self._evictable.remove(job)
            self._waiting.add(job)
        elif job.state is State.PREFILLING:
            self._leavable.remove(job)
            self._pinned.add(job.number)

    def _next_event(self) -> int:
        """When something comes from outside, at the earliest; -1 if nothing will."""
        while self._paused and self._paused[0][1].aside_since != self._paused[0][0]:
            self._paused.popleft()
        times = []
        if self._arrivals:
            times.append(self._arrivals[0].arrival)
        if self._loading:
            times.append(self._loading[0][0])
        if self._paused:
            times.append(self._paused[0][0] + self._max_pause)
        return min(times, default=-1)

    # The plan

    @property
    def _num_running(self) -> int:
        return self._num_decoding + len(self._prefilling) + len(self._loading)

    def _plan(self) -> bool:
        """Whether pages were short. Then nobody is admitted now, but maybe in the next step."""
        self._looked_at.clear()
        if self._policy.preemptive and self._waiting and self._num_running:
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
        while claimed < self._budget and (job := self._waiting.peek()) is not None:
            last = self._leavable.peek()
            if last is None:
                return
            self._looked_at.add(last.number)
            if self._rank(last) < self._rank(job):
                return
            victims = self._victims(job)
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
        while not self._fits(job, victims, pages):
            last = self._leavable.peek()
            if last is None:
                break
            self._looked_at.add(last.number)
            if not self._may_displace(job, last):
                break
            victims.append(last)
            pages += self.memory.pages_for(self._known_by(last))
            self._leavable.remove(last)
        else:
            return victims
        for victim in victims:
            self._leavable.add(victim)
        return None

    def _may_displace(self, job: Job, victim: Job) -> bool:
        return self._key(job) + self._restore_s(victim, job) < self._key(victim)

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
        return self._num_running >= self._places

    def _fits(self, job: Job, victims: Sequence[Job] = (), pages: int = 0) -> bool:
        """Whether there are a place and pages, one more for each to grow into, once the victims are gone."""
        running = self._num_running - len(victims)
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
            if not self._fits(job):
                return
            left -= self._seat(job)

    # Places and pages

    def _seat(self, job: Job) -> int:
        """Tokens that it wants to compute now."""
        self._waiting.remove(job)
        self._evictable.remove(job)
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

    # Steps

    def _decode(self, most: int | None) -> None:
        """As many steps as are alike, but not more than `most`."""
        while (top := self._due[0])[2] != self.jobs[top[1]].stamp:
            heappop(self._due)
        count = self.memory.steps_until_short(self._step, most or top[0] - self._step)
        duration = self._costs.steps(count, self._num_decoding, self._known)
        event = self._next_event()
        if 0 <= event < self._now + duration:
            count = self._costs.steps_until(event - self._now, self._num_decoding, self._known)
            duration = self._costs.steps(count, self._num_decoding, self._known)
        # What ends with the last step gives its pages back; the steps before needed them beside all others.
        self.memory.grow(self._step, count - 1)
        self._evict()
        self.memory.grow(self._step + count - 1, 1)
        self._is_stale |= self.memory.held > self.memory.num_pages
        self._advance(count, duration)

    def _advance(self, count: int, duration: int) -> None:
        self._known += count * self._num_decoding
        self._step += count
        self._now += duration
        self.counts.num_steps += count
        self.counts.busy += duration
        self.counts.computed_tokens += count * self._num_decoding

    def _compute_chunks(self) -> None:
        """One step with parts of prompts in it."""
        shares = self._shares()
        duration = self._costs.steps(1, self._num_decoding, self._known)
        for job, share in shares:
            duration += self._costs.chunk(job.computed, share)
            if job.aside_since >= 0:
                self._end_pause(job)
        self.memory.grow(self._step, 1)
        self._advance(1, duration)
        self._is_stale = True
        for job, share in shares:
            self._computed(job, share)

    def _shares(self) -> list[tuple[Job, int]]:
        left = self._budget - self._num_decoding
        shares = []
        for job in self._by_turn():
            share = min(job.known - job.computed, left)
            if not share:
                break
            shares.append((job, share))
            left -= share
        return shares

    def _by_turn(self) -> Iterable[Job]:
        if len(self._prefilling) == 1:
            return self._prefilling.values()
        few = self.memory.page_size
        return sorted(
            self._prefilling.values(), key=lambda job: (job.known - job.computed > few, self._rank(job))
        )

    def _end_pause(self, job: Job) -> None:
        pause = self._now - job.aside_since
        job.aside_since = -1
        if job.num_output:
            self.counts.longest_stream_pause = max(self.counts.longest_stream_pause, pause)
        else:
            self.counts.longest_prefill_pause = max(self.counts.longest_prefill_pause, pause)

    def _computed(self, job: Job, share: int) -> None:
        """The step computed `share` tokens of it. What it had computed before is not charged."""
        begin, end = job.computed, job.computed + share
        fresh = max(0, end - max(begin, job.reached))
        self.counts.computed_tokens += share
        self.counts.recomputed_tokens += share - fresh
        job.computed = end
        if fresh:
            job.charge(self._costs.charge(end - fresh, fresh))
            job.reached = end
            job.num_left = max(0, job.prompt_len - end)
        if end == job.known:
            self._first_of_many(job)
        elif fresh:
            self._place(job)

    def _first_of_many(self, job: Job) -> None:
        """All that it knows is computed: it has its next token, and from now on decodes."""
        if not job.num_output:
            job.first_token = self._now
        self._leave(job)
        job.num_output += 1
        if job.num_output == job.output_len:
            self._finish(job)
            return
        job.state = State.DECODING
        job.since = self._step
        self.memory.held += self.memory.pages_for(job.known)
        self.memory.start_growing(job.known, self._step)
        self._num_decoding += 1
        self._known += job.known
        if job.pinned:
            self._pinned.add(job.number)
        self._place(job)

    def _settle_due(self) -> None:
        due = self._due
        while due and due[0][0] <= self._step:
            _, number, stamp = heappop(due)
            job = self.jobs[number]
            if job.stamp != stamp:
                continue
            job.settle(self._step, self._costs)
            if job.num_output == job.output_len:
                self._leave(job)
                self._finish(job)
            else:
                before = self._key(job)
                self._place(job)
                # Who comes sooner than before, and was not the one that stood last, is no new victim.
                self._is_stale |= self._key(job) > before or number in self._looked_at

    def _place(self, job: Job) -> None:
        """Into the level where it belongs now, until the next change of it."""
        job.level = self._policy.level(job)
        if not job.pinned:
            self._leavable.add(job)
        if job.state is not State.DECODING:
            return
        change = self._policy.next_change(job)
        last = job.output_len - job.num_output
        until = last if change - job.num_output >= last else max(1, -int(-(change - job.num_output) // 1))
        job.stamp += 1
        heappush(self._due, (self._step + until, job.number, job.stamp))

    def _finish(self, job: Job) -> None:
        job.state = State.DONE
        job.finished = self._now
        self._num_left -= 1
        self._is_stale = True
        self._policy.learn(job, True)
        self._on_finish()
