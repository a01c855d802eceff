"""The figures of one workload."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.bench.client import Outcome


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a list of values; NaN when there are none. Percentiles interpolate linearly, as numpy's do."""

    mean: float
    p50: float
    p99: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        mean = sum(values) / len(values) if values else math.nan
        ordered = sorted(values)
        return Spread(mean, percentile(ordered, 50), percentile(ordered, 99))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order."""
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Summary:
    """Times in seconds, over the requests that succeeded; rates over the whole workload's duration."""

    num_requests: int
    num_errors: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: Spread
    itl_s: Spread
    completion_s: Spread
    completion_by_label_s: dict[str, Spread]
    errors: dict[str, int]  # message -> how often


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    good = [outcome for outcome in outcomes if not outcome.error]
    begin_s = min(outcome.start_s for outcome in outcomes)
    duration_s = max(outcome.end_s for outcome in outcomes) - begin_s
    output_tokens = sum(outcome.output_tokens for outcome in good)
    labels = sorted({outcome.job.label for outcome in good} - {""}, reverse=True)
    return Summary(
        num_requests=len(outcomes),
        num_errors=len(outcomes) - len(good),
        duration_s=duration_s,
        requests_per_s=len(good) / duration_s if duration_s else math.nan,
        output_tokens_per_s=output_tokens / duration_s if duration_s else math.nan,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in good),
        cached_tokens=sum(outcome.cached_tokens for outcome in good),
        output_tokens=output_tokens,
        ttft_s=Spread.of([outcome.ttft_s for outcome in good if outcome.ttft_s is not None]),
        itl_s=Spread.of([gap_s for outcome in good for gap_s in outcome.gaps_s]),
        completion_s=Spread.of([outcome.completion_s for outcome in good]),
        completion_by_label_s={
            label: Spread.of([o.completion_s for o in good if o.job.label == label]) for label in labels
        },
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
    )
