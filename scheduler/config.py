"""Settings of the scheduler. Every bound has a name and its unit."""

from __future__ import annotations

from dataclasses import dataclass, field

POLICIES = ("mlfq", "mlfq-static", "fcfs", "priority", "hrrn", "srpt")
VICTIMS = ("cheapest", "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    policy: str = field(
        default="mlfq",
        metadata={
            "help": "order of service: mlfq (learned levels), mlfq-static (fixed quanta), fcfs, priority, "
            "hrrn, or srpt (takes max_tokens for the true length)",
            "choices": POLICIES,
        },
    )
    page_size: int = field(default=16, metadata={"help": "tokens per KV page", "min": 1})
    num_pages: int = field(
        default=0, metadata={"help": "KV pages on the device; 0 = as many as kv_cache_bytes holds"}
    )
    host_pages: int = field(
        default=0, metadata={"help": "KV pages in host memory; 0 = as many as host_cache_bytes holds"}
    )
    disk_pages: int = field(
        default=0, metadata={"help": "KV pages in the disk file; 0 = as many as disk_cache_bytes holds"}
    )
    max_num_seqs: int = field(default=64, metadata={"help": "sequences computed in one step", "min": 1})
    max_num_batched_tokens: int = field(
        default=512, metadata={"help": "tokens computed in one step", "min": 1}
    )
    max_queued_requests: int = field(
        default=1024, metadata={"help": "requests that may wait; more are answered 429", "min": 1}
    )
    prefix_cache: bool = field(default=True, metadata={"help": "share KV pages between requests"})
    head_start_gamma: float = field(
        default=0.0,
        metadata={
            "help": "per second: small favours the mean, large the tail (towards fcfs); 0 = adapted to the "
            "observed tail",
            "min": 0.0,
        },
    )
    max_head_start_s: float = field(
        default=600.0,
        metadata={"help": "the largest head start of mlfq, which bounds overtaking", "min": 0.0},
    )
    max_pause_s: float = field(
        default=30.0,
        metadata={"help": "a sequence put aside for longer has the next place that comes free", "min": 0.0},
    )
    victims: str = field(
        default="cheapest",
        metadata={
            "help": "who gives up pages: the lowest level's cheapest to restore, or the last in order",
            "choices": VICTIMS,
        },
    )
    reserve_share: float = field(
        default=0.02,
        metadata={
            "help": "share of the pages kept free for those who precede somebody running",
            "min": 0.0,
            "max": 0.5,
        },
    )
    max_copies_in_flight: int = field(
        default=256, metadata={"help": "pages on their way between tiers at a time", "min": 1}
    )
    growth_share: float = field(
        default=0.6,
        metadata={
            "help": "share of their expected output for which pages are kept when others are admitted: 0 "
            "preempts and computes twice, 1 leaves pages idle",
            "min": 0.0,
        },
    )
    min_shared_tokens: int = field(
        default=64,
        metadata={
            "help": "tokens of a common prefix, in whole pages, that others wait for or are grouped by",
            "min": 16,
        },
    )
    tenant_weights: tuple[str, ...] = field(
        default=(), metadata={"help": "name=weight: shares of service under contention; others weigh 1"}
    )
    max_tenant_running: int = field(
        default=0,
        metadata={
            "help": "sequences of one tenant computed in one step, in whatever order it has; 0 = no limit",
            "min": 0,
        },
    )
    static_quantum_s: float = field(
        default=0.1, metadata={"help": "mlfq-static: work that the first level covers", "min": 0.001}
    )
    static_levels: int = field(default=8, metadata={"help": "mlfq-static: number of levels", "min": 1})
    static_max_head_start_s: float = field(
        default=60.0, metadata={"help": "mlfq-static: head start of the first level", "min": 0.0}
    )
