"""Whole workloads, a thousand of them; and proof that the simulation would notice."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from scheduler import choices, planning, scheduler, simulate
from scheduler.config import POLICIES
from scheduler.page_tables import PageTables
from scheduler.pages import PagePool
from scheduler.places import Places
from scheduler.scheduler import Scheduler
from scheduler.simulate import Simulation
from scheduler.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_SEEDS = 1000


def test_a_thousand_worlds_hold() -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        try:
            report = Simulation(seed).run()
        except AssertionError as error:
            raise AssertionError(f"python -m scheduler.simulate --seed {seed}: {error}") from error
        seen.update(report.finishes)
        seen.update(
            preemptions=report.num_preemptions,
            hits=report.hit_tokens,
            recomputed=report.recomputed_tokens,
            refused=report.num_refused,
        )
    # The worlds are worth their time: everything that can happen did, and often.
    assert all(seen[finish] >= NUM_SEEDS // 20 for finish in FinishReason)
    assert seen["preemptions"] > NUM_SEEDS
    assert min(seen["hits"], seen["recomputed"], seen["refused"]) > NUM_SEEDS // 5


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
    def commit(sequence: Any, committed: tuple[int, ...], limit: int) -> Any:
        finish = original(sequence, committed, limit)
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
    def end_all(self: Scheduler, group: Any, finish: Any) -> Any:
        group.held_back.clear()
        return original(self, group, finish)[:1]

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


_BUGS = [
    (scheduler, "root_key", _share_all_salts),
    (scheduler, "commit", _drop_nothing_after_a_stop),
    (PageTables, "publish", _publish_all),
    (PageTables, "drop", _keep_pages_of_the_preempted),
    (PageTables, "hold", _believe_the_engine_knows),
    (PagePool, "hold", _evict_held_pages),
    (Scheduler, "_end_all", _forget_the_held_back),
    (Scheduler, "_take_ended_at_once", _report_twice),
    (planning, "_portion", _split_windows),
    (Places, "by_policy", _preempt_the_first),
]


@pytest.mark.parametrize(("owner", "name", "bug"), _BUGS, ids=[bug.__name__[1:] for *_, bug in _BUGS])
def test_a_planted_bug_is_found(
    owner: Any, name: str, bug: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, bug(getattr(owner, name)))
    with pytest.raises((AssertionError, KeyError)):
        _simulate(300)


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
