"""The bound of the text side's queue, however its jobs come."""

from __future__ import annotations

import asyncio
import threading

from server.errors import ApiError
from server.text_threads import TextThreads


def test_jobs_that_come_at_once_do_not_pass_the_bound_together() -> None:
    threads = TextThreads(num_threads=2, max_waiting=1)
    go = threading.Event()

    async def burst() -> list[bool | BaseException]:
        jobs = [asyncio.ensure_future(threads.run_bounded(lambda: go.wait(20))) for _ in range(6)]
        refused, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        go.set()
        assert jobs[3] in refused
        return await asyncio.gather(*jobs, return_exceptions=True)

    done = asyncio.run(burst())
    assert done[:3] == [True, True, True]
    assert [isinstance(each, ApiError) and each.code == "text_queue_full" for each in done[3:]] == [True] * 3
    assert asyncio.run(threads.run_bounded(lambda: "free again")) == "free again"


def test_a_job_that_raises_gives_its_place_back() -> None:
    threads = TextThreads(num_threads=1, max_waiting=0)

    async def one_after_the_other() -> None:
        for _ in range(3):
            outcome = await asyncio.gather(threads.run_bounded(lambda: 1 // 0), return_exceptions=True)
            assert isinstance(outcome[0], ZeroDivisionError)

    asyncio.run(one_after_the_other())
