"""Whole workloads, a thousand of them; and proof that the simulation would notice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pytest

from scheduler import choices, page_tables, planning, scheduler, simulate
from scheduler.config import POLICIES
from scheduler.page_tables import PageTables
from scheduler.pages import PagePool
from scheduler.places import Places
from scheduler.plan import Copied, Tier
from scheduler.planning import Planner
from scheduler.scheduler import Scheduler
from scheduler.simulate import Simulation
from scheduler.spans import Spans
from scheduler.tenants import Tenants
from scheduler.tiers import Tiers
from scheduler.types import FinishReason
from scheduler.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_SEEDS = 1000
HAPPENED = (
    "preemptions",
    "kept",
    "overdue",
    "parked",
    "fetched",
    "down",
    "shared",
    "slid",
    "deaths",
    "refused: queue_full",
    "refused: memory",
    "refused: deadline",
)


def test_a_thousand_worlds_hold() -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        try:
            report = Simulation(seed).run()
        except AssertionError as error:
            raise AssertionError(f"python -m scheduler.simulate --seed {seed}: {error}") from error
        seen.update(report.finishes)
        seen.update(report.totals)
    # The worlds are worth their time: everything that can happen did, and often.
    rare = {name: seen[name] for name in (*FinishReason, *HAPPENED) if seen[name] < NUM_SEEDS // 40}
    assert not rare
    assert min(seen["hits"], seen["recomputed"], seen["down"]) > NUM_SEEDS


def _simulate(num_seeds: int) -> None:
    for seed in range(num_seeds):
        Simulation(seed).run()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_is_one_world(policy: str) -> None:
    assert Simulation(5, policy).run() == Simulation(5, policy).run()


def _share_all_salts(original: Any) -> Any:
    return lambda rule, salt, private_to=None: original(rule, "", private_to)


def _publish_all(original: Any) -> Any:
    def publish(self: PageTables, sequence: Any, since: int) -> None:
        sequence.num_findable = sequence.num_computed
        original(self, sequence, since)

    return publish


def _drop_nothing_after_a_stop(original: Any) -> Any:
    def commit(sequence: Any, committed: tuple[int, ...]) -> Any:
        finish = original(sequence, committed)
        if finish is FinishReason.STOP and len(committed) > 1:
            sequence.tokens.append(committed[-1])
        return finish

    return commit


def _keep_pages_of_the_preempted(original: Any) -> Any:
    def drop(self: PageTables, sequence: Any) -> None:
        sequence.pages = []
        sequence.num_computed = sequence.num_findable = sequence.num_pages_sent = 0

    return drop


def _evict_held_pages(original: Any) -> Any:
    def hold(self: PagePool, page: int) -> None:
        self.references[page] += 1

    return hold


def _forget_the_held_back(original: Any) -> Any:
    def end_all(self: Scheduler, group: Any, *how: Any) -> Any:
        group.held_back.clear()
        return original(self, group, *how)[:1]

    return end_all


def _report_twice(original: Any) -> Any:
    return lambda self: list(self._ended_at_once)


def _split_windows(original: Any) -> Any:
    return lambda sequence, room: min(room, sequence.num_tokens - sequence.num_computed)


def _believe_the_engine_knows(original: Any) -> Any:
    def hold(self: PageTables, sequence: Any, found: list[int]) -> None:
        original(self, sequence, found)
        sequence.num_pages_sent = len(found)

    return hold


def _preempt_the_first(original: Any) -> Any:
    return lambda self: original(self)[::-1]


def _read_before_it_landed(original: Any) -> Any:
    def begin(self: Tiers, key: bytes, source: Tier, source_page: int, target: Tier, page: int) -> None:
        original(self, key, source, source_page, target, page)
        if target is Tier.DEVICE:
            self.pool.register(page, key)

    return begin


def _release_the_source(original: Any) -> Any:
    def begin(self: Tiers, key: bytes, source: Tier, source_page: int, target: Tier, page: int) -> None:
        original(self, key, source, source_page, target, page)
        if source is Tier.DEVICE:
            self.pool.release([source_page])

    return begin


def _fetch_another_page(original: Any) -> Any:
    def begin(self: Tiers, key: bytes, source: Tier, source_page: int, target: Tier, page: int) -> None:
        if target is Tier.DEVICE:
            source_page = min(self._tier(source).page_of.values())
        original(self, key, source, source_page, target, page)

    return begin


def _believe_failed_copies(original: Any) -> Any:
    return lambda self, copied: original(self, Copied(copied.number, ok=True))


def _never_unpark(original: Any) -> Any:
    return lambda self, seq_id: None


def _forget_the_overdue(original: Any) -> Any:
    return lambda self: None


def _bring_a_claim_from_before(original: Any) -> Any:
    def enter(self: Tenants, name: str) -> Any:
        known = self.active.get(name) or self._idle.get(name)
        served_s = known.served_s if known else 0.0
        tenant = original(self, name)
        tenant.served_s = served_s
        return tenant

    return enter


def _let_a_tenant_run_all(original: Any) -> Any:
    return lambda self, tenant: True


def _leave_heads_stale(original: Any) -> Any:
    return lambda self, tenant: None


def _lose_what_was_delivered(original: Any) -> Any:
    return lambda self, request: original(self, replace(request, delivered=()))


def _let_go_too_early(original: Any) -> Any:
    def __init__(self: Spans, spans: tuple[int, ...], page_size: int) -> None:
        original(self, spans, page_size)
        self.behind = tuple(max(0, behind - 1) for behind in self.behind)

    return __init__


def _let_go_of_nothing(original: Any) -> Any:
    return lambda self, sequence, since: None


def _find_the_prefix_only(original: Any) -> Any:
    """As if the pages that no token sees had to be there, and those before the end need not."""

    def reach(self: PageTables, sequence: Any, is_there: Any, num_blocks: int | None = None) -> int:
        limit = self.num_shareable(sequence) if num_blocks is None else num_blocks
        return min(
            sum(1 for _ in takewhile(is_there, self._keys(sequence, group, limit)))
            for group in range(max(1, self.spans.num_whole))
        )

    return reach


def _free_what_others_hold(original: Any) -> Any:
    def slide(self: PageTables, sequence: Any, since: int) -> None:
        held = set(self.held(sequence.pages))
        original(self, sequence, since)
        for page in held - set(sequence.pages):
            if self.pool.references[page]:
                self.pool.forget(page)
                self.pool.release([page])

    return slide


def _one_key_for_all_groups(original: Any) -> Any:
    return lambda key, group: key


def _take_from_those_ahead(original: Any) -> Any:
    def provide(self: Planner, ranked: list[Any], number: int, share: int) -> Any:
        return original(self, ranked[::-1], len(ranked) - 1 - number, share)

    return provide


_BUGS = [
    (Spans, "__init__", _let_go_too_early),
    (PageTables, "slide", _let_go_of_nothing),
    (PageTables, "slide", _free_what_others_hold),
    (PageTables, "reach", _find_the_prefix_only),
    (page_tables, "group_key", _one_key_for_all_groups),
    (scheduler, "root_key", _share_all_salts),
    (scheduler, "commit", _drop_nothing_after_a_stop),
    (PageTables, "publish", _publish_all),
    (PageTables, "drop", _keep_pages_of_the_preempted),
    (PageTables, "hold", _believe_the_engine_knows),
    (PagePool, "hold", _evict_held_pages),
    (Scheduler, "_end_all", _forget_the_held_back),
    (Scheduler, "_take_ended_at_once", _report_twice),
    (Scheduler, "_make_choices", _lose_what_was_delivered),
    (planning, "portion", _split_windows),
    (Planner, "_provide", _take_from_those_ahead),
    (Places, "by_policy", _preempt_the_first),
    (Places, "unpark", _never_unpark),
    (Places, "call_overdue", _forget_the_overdue),
    (WaitingQueue, "tenant_changed", _leave_heads_stale),
    (Tenants, "enter", _bring_a_claim_from_before),
    (Tenants, "may_run", _let_a_tenant_run_all),
    (Tiers, "_begin", _read_before_it_landed),
    (Tiers, "_begin", _release_the_source),
    (Tiers, "_begin", _fetch_another_page),
    (Tiers, "ended", _believe_failed_copies),
]


@pytest.mark.parametrize(("owner", "name", "bug"), _BUGS, ids=[bug.__name__[1:] for *_, bug in _BUGS])
def test_a_planted_bug_is_found(
    owner: Any, name: str, bug: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, bug(getattr(owner, name)))
    with pytest.raises((AssertionError, LookupError)):
        _simulate(1000)


def test_a_failure_prints_how_to_replay_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scheduler, "commit", _drop_nothing_after_a_stop(choices.commit))
    assert simulate.main(["--seeds", "300", "--policy", "mlfq"]) == 1
    printed = capsys.readouterr().err
    replay = printed.splitlines()[-1].removeprefix("replay: python -m scheduler.simulate ").split()
    assert replay[0] == "--seed"
    with pytest.raises(AssertionError):
        simulate.main(replay)


def test_the_command_line_counts_its_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--seeds", "3"]) == 0
    assert "3/3 seeds" in capsys.readouterr().err
