"""What a replay says: figures as values, ready for a table or JSON. Times in seconds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.replay.ticks import seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from scheduler.replay.job import Job
    from scheduler.replay.replica import Replica

NUM_CLASSES = 4


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles are values that occurred (nearest rank)."""

    mean: float
    p50: float
    p99: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        if not ordered:
            return Spread(math.nan, math.nan, math.nan)
        return Spread(math.fsum(ordered) / len(ordered), _rank(ordered, 0.5), _rank(ordered, 0.99))


def _rank(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class ClassReport:
    """Requests with lengths from `least` to `most` tokens."""

    least: int
    most: int
    num_requests: int
    completion_s: Spread
    first_token_s: Spread


@dataclass(frozen=True, slots=True)
class TenantReport:
    """`service_s` is what was attributed to its requests; `share` of the service of all."""

    tenant: str
    num_requests: int
    service_s: float
    share: float
    completion_s: Spread
    first_token_s: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One policy. Counts are sums over the machines. The utilisation is the share of time in which a machine
    computes, up to the end of the last request."""

    policy: str
    num_requests: int
    duration_s: float
    completion_s: Spread
    first_token_s: Spread
    by_output: tuple[ClassReport, ...]  # quarters of the requests
    by_input: tuple[ClassReport, ...]
    by_tenant: tuple[TenantReport, ...]  # most service first; empty where the trace has no tenants
    preempted_for_place: int
    preempted_for_pages: int
    pages_out: int  # from the device to host or disk
    pages_in: int
    pages_lost: int  # in no tier any more when they were wanted
    computed_tokens: int
    recomputed_tokens: int
    longest_stream_pause_s: float  # of a sequence that had delivered tokens
    longest_prefill_pause_s: float  # of one that had only begun its prompt
    utilisation: float
    num_steps: int
    num_events: int
    wall_s: float  # how long the simulation took

    @property
    def requests_per_s(self) -> float:
        """Simulated."""
        return self.num_requests / self.wall_s if self.wall_s else math.inf


def report(policy: str, replicas: Sequence[Replica], wall_s: float) -> Report:
    jobs = [job for replica in replicas for job in replica.jobs]
    counts = [replica.counts for replica in replicas]
    memories = [replica.memory for replica in replicas]
    duration_s = seconds(max(count.end for count in counts))
    return Report(
        policy=policy,
        num_requests=len(jobs),
        duration_s=duration_s,
        completion_s=Spread.of(map(completion_s, jobs)),
        first_token_s=Spread.of(map(first_token_s, jobs)),
        by_output=_classes(jobs, lambda job: job.output_len),
        by_input=_classes(jobs, lambda job: job.prompt_len),
        by_tenant=_tenants(jobs),
        preempted_for_place=sum(count.preempted_for_place for count in counts),
        preempted_for_pages=sum(count.preempted_for_pages for count in counts),
        pages_out=sum(memory.pages_out for memory in memories),
        pages_in=sum(memory.pages_in for memory in memories),
        pages_lost=sum(memory.pages_lost for memory in memories),
        computed_tokens=sum(count.computed_tokens for count in counts),
        recomputed_tokens=sum(count.recomputed_tokens for count in counts),
        longest_stream_pause_s=seconds(max(count.longest_stream_pause for count in counts)),
        longest_prefill_pause_s=seconds(max(count.longest_prefill_pause for count in counts)),
        utilisation=seconds(sum(count.busy for count in counts)) / (duration_s * len(counts)),
        num_steps=sum(count.num_steps for count in counts),
        num_events=sum(count.num_events for count in counts),
        wall_s=wall_s,
    )


def completion_s(job: Job) -> float:
    return seconds(job.finished - job.arrival)


def first_token_s(job: Job) -> float:
    return seconds(job.first_token - job.arrival)


def _classes(jobs: Sequence[Job], length: Callable[[Job], int]) -> tuple[ClassReport, ...]:
    """Quarters by length; equal lengths are in one class, so there may be fewer than four."""
    ordered = sorted(map(length, jobs))
    tops = sorted({_rank_of(ordered, k) for k in range(1, NUM_CLASSES + 1)})
    members: list[list[Job]] = [[] for _ in tops]
    for job in jobs:
        members[bisect_left(tops, length(job))].append(job)
    return tuple(
        ClassReport(
            least=min(map(length, some)),
            most=max(map(length, some)),
            num_requests=len(some),
            completion_s=Spread.of(map(completion_s, some)),
            first_token_s=Spread.of(map(first_token_s, some)),
        )
        for some in members
    )


def _rank_of(ordered: Sequence[int], quarter: int) -> int:
    return ordered[math.ceil(quarter * len(ordered) / NUM_CLASSES) - 1]


def _tenants(jobs: Sequence[Job]) -> tuple[TenantReport, ...]:
    by_name: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_name[job.tenant].append(job)
    if not any(by_name):
        return ()
    total_s = math.fsum(job.attained_s for job in jobs)
    found = [
        TenantReport(
            tenant=tenant,
            num_requests=len(some),
            service_s=math.fsum(job.attained_s for job in some),
            share=math.fsum(job.attained_s for job in some) / total_s if total_s else 0.0,
            completion_s=Spread.of(map(completion_s, some)),
            first_token_s=Spread.of(map(first_token_s, some)),
        )
        for tenant, some in by_name.items()
    ]
    return tuple(sorted(found, key=lambda tenant: (-tenant.service_s, tenant.tenant)))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of one policy over those of fcfs, and how far its mean completion is on the way from fcfs (0)
    to srpt (1); NaN without srpt, or where srpt gains nothing."""

    policy: str
    mean_completion: float
    p99_completion: float
    mean_first_token: float
    towards_srpt: float


def compare(reports: Sequence[Report]) -> tuple[Comparison, ...]:
    """Empty without fcfs among them."""
    by_policy = {report.policy: report for report in reports}
    base, best = by_policy.get("fcfs"), by_policy.get("srpt")
    if base is None:
        return ()
    way_s = base.completion_s.mean - best.completion_s.mean if best else 0.0
    return tuple(
        Comparison(
            policy=other.policy,
            mean_completion=other.completion_s.mean / base.completion_s.mean,
            p99_completion=other.completion_s.p99 / base.completion_s.p99,
            mean_first_token=other.first_token_s.mean / base.first_token_s.mean,
            towards_srpt=(base.completion_s.mean - other.completion_s.mean) / way_s
            if way_s > 0
            else math.nan,
        )
        for other in reports
    )
