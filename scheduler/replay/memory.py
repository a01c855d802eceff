"""Pages of the simulated device, host and disk: counts only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.machine import Machine
    from scheduler.replay.job import Job


class Memory:
    """`held` pages belong to jobs with a place, in full for the tokens that they know; `cached` ones were
    left by jobs put aside and go when the room is needed.

    A decoding job takes a page whenever it knows one token more than its pages hold. Decoding jobs are
    counted by the steps at which they do (modulo the page size), so that growth over many steps is known
    at once.
    """

    def __init__(self, machine: Machine) -> None:
        self.page_size = machine.page_size
        self.num_pages = machine.num_pages
        self.host_free = machine.host_pages
        self.disk_free = machine.disk_pages
        self.held = 0
        self.cached = 0
        self.pages_out = 0  # to the host or the disk
        self.pages_in = 0  # back from there
        self.pages_lost = 0  # found in no tier again
        self._growing = [0] * machine.page_size
        self._num_growing = 0

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    @property
    def free(self) -> int:
        return self.num_pages - self.held - self.cached

    @property
    def excess(self) -> int:
        """Cached pages whose room is needed."""
        return min(self.cached, self.held + self.cached - self.num_pages)

    def start_growing(self, known: int, step: int) -> None:
        self._growing[(known - step) % self.page_size] += 1
        self._num_growing += 1

    def stop_growing(self, known: int, step: int) -> None:
        self._growing[(known - step) % self.page_size] -= 1
        self._num_growing -= 1

    def grow(self, step: int, num_steps: int) -> None:
        """Every decoding job computed `num_steps` tokens from step `step` on."""
        self.held += self._growth(step, num_steps)

    def steps_until_short(self, step: int, most: int) -> int:
        """After how many steps, at most `most`, jobs hold more pages than there are."""
        room = self.num_pages - self.held
        if self._growth(step, most) <= room:
            return most
        count = (room // self._num_growing) * self.page_size  # whole rounds that surely fit
        taken = self._growth(step, count)
        while taken <= room:
            taken += self._growing[-(step + count) % self.page_size]
            count += 1
        return count

    def _growth(self, step: int, num_steps: int) -> int:
        rounds, rest = divmod(num_steps, self.page_size)
        first = -step % self.page_size
        grown = rounds * self._num_growing
        for k in range(rest):
            grown += self._growing[first - k]  # a negative index counts from the end, which is the modulus
        return grown

    def leave(self, job: Job, num_tokens: int) -> None:
        """A job put aside leaves the full pages of its `num_tokens` tokens to be found again."""
        job.device_pages = num_tokens // self.page_size
        self.cached += job.device_pages

    def evict(self, job: Job) -> None:
        """Take from a job put aside what room is needed, its last pages first. They move to the host, else
        to the disk; where both are full its last pages are lost."""
        count = min(job.device_pages, self.excess)
        job.device_pages -= count
        self.cached -= count
        to_host = min(count, self.host_free)
        to_disk = min(count - to_host, self.disk_free)
        job.host_pages += to_host
        job.disk_pages += to_disk
        self.host_free -= to_host
        self.disk_free -= to_disk
        self.pages_out += to_host + to_disk
        self.pages_lost += count - to_host - to_disk

    def seat(self, job: Job, moves: bool) -> None:
        """A job gets a place, and pages for all tokens that it knows. What it left on the device is found
        there; what lies below is fetched if it `moves`, else dropped."""
        self.cached -= job.device_pages
        self.held += self.pages_for(job.known)
        self.host_free += job.host_pages
        self.disk_free += job.disk_pages
        fetched = job.moved_pages if moves else 0
        self.pages_in += fetched
        self.pages_lost += job.moved_pages - fetched
        job.computed = (job.device_pages + fetched) * self.page_size
        assert job.computed < job.known, "the token that it will look up next is never left behind"
        job.device_pages = job.host_pages = job.disk_pages = 0
