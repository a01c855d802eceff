"""The scheduler's gauges and counters as Prometheus families, made when they are asked for.

A step only leaves its stats here. The engine's counters begin at zero with every engine process; what the
earlier ones counted is added, so that a counter never falls.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from scheduler.plan import LevelStats, SchedulerStats, Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric

ENGINE = "0"
Samples = list[tuple[tuple[str, ...], float]]  # label values after those of `labels_of`, and the value


def labels_of(name: str, model_name: str) -> dict[str, str]:
    """Labels that every series of that name has. vLLM's name its engine, of which there is one here."""
    engine = {"engine": ENGINE} if name.startswith("vllm:") else {}
    return {"model_name": model_name} | engine


class Family(NamedTuple):
    name: str
    text: str
    samples: Callable[[SchedulerStats], Samples]
    labels: tuple[str, ...] = ()


class SchedulerMetrics(Collector):
    def __init__(self, model_name: str) -> None:
        self.stats = SchedulerStats()
        self._model = model_name
        self._before: dict[str, Counter[tuple[str, ...]]] = {family.name: Counter() for family in COUNTERS}

    def begin_again(self, num_pages: int) -> None:
        """Another engine computes, or none: what it reports before its first step. Levels stay known."""
        for family in COUNTERS:
            self._before[family.name].update(dict(family.samples(self.stats)))
        levels = tuple(LevelStats(piece.level) for piece in self.stats.levels)
        tiers = tuple(replace(piece, num_used=0, num_busy=0, num_in=0) for piece in self.stats.tiers)
        self.stats = SchedulerStats(num_pages=num_pages, levels=levels, tiers=tiers if num_pages else ())

    def collect(self) -> Iterator[Metric]:
        for family in GAUGES:
            yield self._filled(family, GaugeMetricFamily, family.samples(self.stats))
        for family in COUNTERS:
            values = Counter(self._before[family.name])
            values.update(dict(family.samples(self.stats)))
            yield self._filled(family, CounterMetricFamily, values.items())

    def _filled(
        self,
        family: Family,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        samples: Iterable[tuple[tuple[str, ...], float]],
    ) -> Metric:
        common = labels_of(family.name, self._model)
        metric = kind(family.name, family.text, labels=(*common, *family.labels))
        for labels, value in samples:
            metric.add_metric((*common.values(), *labels), value)
        return metric


def _one(value_of: Callable[[SchedulerStats], float]) -> Callable[[SchedulerStats], Samples]:
    return lambda stats: [((), value_of(stats))]


def _by_level(value_of: Callable[[LevelStats], float]) -> Callable[[SchedulerStats], Samples]:
    return lambda stats: [((str(piece.level),), value_of(piece)) for piece in stats.levels]


def _name(tier: Tier) -> str:
    return tier.name.lower()


def _level_states(stats: SchedulerStats) -> Samples:
    return [
        ((str(piece.level), state), count)
        for piece in stats.levels
        for state, count in (("waiting", piece.num_waiting), ("running", piece.num_running))
    ]


def _pages(stats: SchedulerStats) -> Samples:
    free = stats.num_pages - stats.num_pages_held - stats.num_pages_cached
    device = (("held", stats.num_pages_held), ("cached", stats.num_pages_cached), ("free", free))
    samples: Samples = [((_name(Tier.DEVICE), state), count) for state, count in device]
    for piece in stats.tiers:
        free = max(0, piece.num_pages - piece.num_used - piece.num_busy)
        states = (("used", piece.num_used), ("busy", piece.num_busy), ("free", free))
        samples += [((_name(piece.tier), state), count) for state, count in states]
    return samples


def _pages_copied(stats: SchedulerStats) -> Samples:
    down = [((_name(piece.tier),), float(piece.num_in)) for piece in stats.tiers]
    return [((_name(Tier.DEVICE),), stats.num_pages_up), *down]


def _preemptions(stats: SchedulerStats) -> Samples:
    return [
        (("places",), stats.num_preempted_for_places),
        (("pages",), stats.num_preempted_for_pages),
    ]


def _resumed(stats: SchedulerStats) -> Samples:
    return [
        (("kept",), stats.num_resumed_kept),
        (("fetched",), stats.num_resumed_fetched),
        (("recomputed",), stats.num_resumed_recomputed),
    ]


def _usage(stats: SchedulerStats) -> float:
    return stats.num_pages_held / stats.num_pages if stats.num_pages else 0.0


GAUGES = (
    Family("vllm:num_requests_running", "Sequences that hold pages.", _one(lambda s: s.num_running)),
    Family("vllm:num_requests_waiting", "Sequences that wait.", _one(lambda s: s.num_waiting)),
    Family("vllm:kv_cache_usage_perc", "Share of KV pages held by sequences, 0 to 1.", _one(_usage)),
    Family(
        "octavo:level_sequences",
        "Sequences per level of the feedback queue.",
        _level_states,
        ("level", "state"),
    ),
    Family(
        "octavo:parked_sequences",
        "Of those that wait: until pages are computed by another, or fetched.",
        _one(lambda s: s.num_parked),
    ),
    Family(
        "octavo:pages",
        "KV pages. Device: held by sequences, cached, free. Host and disk: used, busy with a copy, free.",
        _pages,
        ("tier", "state"),
    ),
    Family(
        "octavo:backlog_seconds",
        "Service that the accepted sequences are expected to need still.",
        _one(lambda s: s.backlog_s),
    ),
    Family(
        "octavo:head_start_gamma",
        "Per second: small favours the mean, large the tail. 0 where the policy has none.",
        _one(lambda s: s.head_start_gamma),
    ),
    Family(
        "octavo:longest_pause_seconds",
        "Longest pause of a started sequence since the engine started.",
        _one(lambda s: s.longest_pause_s),
    ),
)
COUNTERS = (
    Family(
        "vllm:prefix_cache_queries",
        "Tokens looked up in the prefix cache.",
        _one(lambda s: s.prefix_query_tokens),
    ),
    Family(
        "vllm:prefix_cache_hits", "Tokens found in the prefix cache.", _one(lambda s: s.prefix_hit_tokens)
    ),
    Family("vllm:num_preemptions", "Sequences that lost their pages.", _one(lambda s: s.num_preemptions)),
    Family("octavo:preemptions", "The same by what was short.", _preemptions, ("reason",)),
    Family(
        "octavo:resumed",
        "Preempted sequences that run again, by where their KV was: kept on the device, fetched from a "
        "lower tier, or some of it recomputed.",
        _resumed,
        ("kind",),
    ),
    Family(
        "octavo:recomputed_tokens",
        "Tokens computed again after a preemption.",
        _one(lambda s: s.recomputed_tokens),
    ),
    Family(
        "octavo:overdue",
        "Sequences that were put aside for longer than max_pause_s.",
        _one(lambda s: s.num_overdue),
    ),
    Family(
        "octavo:level_entered", "Sequences that joined here.", _by_level(lambda p: p.num_entered), ("level",)
    ),
    Family(
        "octavo:level_demoted",
        "Sequences that sank from here.",
        _by_level(lambda p: p.num_demoted),
        ("level",),
    ),
    Family(
        "octavo:level_promoted",
        "Sequences that rose from here.",
        _by_level(lambda p: p.num_promoted),
        ("level",),
    ),
    Family(
        "octavo:level_preempted",
        "Sequences put aside while here.",
        _by_level(lambda p: p.num_preempted),
        ("level",),
    ),
    Family(
        "octavo:level_seated",
        "Sequences that got a place here.",
        _by_level(lambda p: p.num_seated),
        ("level",),
    ),
    Family(
        "octavo:level_waited_seconds",
        "Time that they had waited for it.",
        _by_level(lambda p: p.waited_s),
        ("level",),
    ),
    Family("octavo:pages_copied", "KV pages that arrived by a copy.", _pages_copied, ("to",)),
)
