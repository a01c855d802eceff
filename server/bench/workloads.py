"""The named workloads: who asks for how much, when, and how many ask at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """One request. Lengths in tokens; `at_s` counts from the start of the workload (traces only)."""

    input_tokens: int
    output_tokens: int
    at_s: float = 0.0
    label: str = ""  # groups requests whose completion times are reported apart


@dataclass(frozen=True, slots=True)
class Workload:
    """`concurrency` clients send the jobs one after another; without it every job is sent at its time."""

    name: str
    about: str
    jobs: tuple[Job, ...]
    concurrency: int | None


def _uniform(name: str, clients: int, count: int, input_tokens: int, output_tokens: int) -> Workload:
    about = f"{clients} at once, {input_tokens:,} in {output_tokens} out, {count} requests"
    return Workload(name, about, (Job(input_tokens, output_tokens),) * count, clients)


def _short_and_long(count: int) -> Workload:
    jobs = tuple(
        Job(128, 512, label="long") if i % 5 == 0 else Job(128, 16, label="short") for i in range(count)
    )
    return Workload(
        "E", f"{count} sent at once, 128 in; four in five 16 out, one in five 512 out", jobs, count
    )


NAMED = ("A", "B", "C", "D", "E")


def named(name: str, requests: int | None = None) -> Workload:
    """Workload A, B, C, D or E, with its own number of requests or the given one."""
    match name:
        case "A":
            return _uniform("A", 1, requests or 8, 128, 128)
        case "B":
            return _uniform("B", 8, requests or 32, 128, 128)
        case "C":
            return _uniform("C", 32, requests or 64, 128, 128)
        case "D":
            return _uniform("D", 4, requests or 16, 1024, 16)
        case "E":
            return _short_and_long(requests or 24)
    raise ValueError(f"no workload {name!r}")
