"""One simulated machine: what happens when, and how long the steps last.

Who computes what is planned by the rules of `Seats`. While nobody has a prompt to compute, all running jobs
advance by one token per step, and nothing can change before the next arrival, end, change of a level or
shortage of pages: the steps up to there are one event.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from scheduler.replay.job import Job, State
from scheduler.replay.seats import Seats
from scheduler.replay.ticks import seconds, ticks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from scheduler.clock import Clock
    from scheduler.machine import Machine
    from scheduler.policies.base import Policy
    from scheduler.replay.trace import TraceRequest


class Replica(Seats):
    """See `Seats`. `on_finish` is called at the end of every request."""

    def __init__(
        self,
        machine: Machine,
        make: Callable[[Clock], Policy],
        requests: Sequence[TraceRequest],
        *,
        max_pause_s: float,
        growth_share: float,
        known_lengths: bool = False,
        on_finish: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(machine, make, requests, max_pause_s, growth_share, known_lengths)
        self._max_pause = ticks(max_pause_s)
        self._on_finish = on_finish
        self._arrivals = deque(self.jobs)
        self._due: list[tuple[int, int, int]] = []  # (step, number, stamp) of ends and changes of level
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
                assert self._now >= 0, "a request fits into no empty machine (see load.fitted)"
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
            self._policy.enter(job)
            job.level = self._policy.level(job)
            expected = self._lengths.index(job.tenant, job.prompt_len).mean_left(0, job.max_output)
            job.num_expected = job.prompt_len + int(expected * self._growth_share)
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
        self._seated[job.number] = job
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
        if self._policy.lengths is None:
            self._lengths.observe(job.tenant, job.prompt_len, job.num_output, True)
        self._policy.learn(job, True)
        self._policy.leave(job)
        self._on_finish()
