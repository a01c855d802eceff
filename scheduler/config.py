"""Settings of the scheduler. Every bound has a name and its unit."""

from __future__ import annotations

from dataclasses import dataclass, field

POLICIES = ("mlfq", "fcfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    policy: str = field(
        default="mlfq", metadata={"help": "order of service: mlfq or fcfs", "choices": POLICIES}
    )
    page_size: int = field(default=16, metadata={"help": "tokens per KV page", "min": 1})
    num_pages: int = field(
        default=0, metadata={"help": "KV pages on the device; 0 = as many as kv_cache_bytes holds"}
    )
    max_num_seqs: int = field(default=64, metadata={"help": "sequences computed in one step", "min": 1})
    max_num_batched_tokens: int = field(
        default=512, metadata={"help": "tokens computed in one step", "min": 1}
    )
    max_queued_requests: int = field(
        default=1024, metadata={"help": "requests that may wait; more are answered 429", "min": 1}
    )
    prefix_cache: bool = field(default=True, metadata={"help": "share KV pages between requests"})
    mlfq_quantum_s: float = field(
        default=0.05,
        metadata={"help": "predicted work that one level of the feedback queue covers", "min": 0.001},
    )
    mlfq_levels: int = field(default=8, metadata={"help": "levels of the feedback queue", "min": 1})
    mlfq_max_head_start_s: float = field(
        default=10.0, metadata={"help": "head start of the highest level, which bounds overtaking"}
    )
