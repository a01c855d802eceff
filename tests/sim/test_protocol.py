"""Three hundred worlds of server, wire and engine; and proof that the simulation would notice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from engine.blame import Blame
from engine.core import EngineCore
from engine.journal import Journal, JournalEntry
from engine.messages import StepOutput, Submit
from scheduler.types import FinishReason
from tests.sim import protocol
from tests.sim.protocol import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_SEEDS = 300
HAPPENED = (
    "deaths",
    "crashes",
    "culprits",
    "lost outputs",
    "aborts",
    "failed steps",
    "preemptions",
    "fetched",
    "refused: queue_full",
    "refused: memory",
    "refused: deadline",
)


def test_three_hundred_worlds_hold() -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        try:
            seen.update(Protocol(seed).run())
        except AssertionError as error:
            raise AssertionError(f"python -m tests.sim.protocol --seed {seed}: {error}") from error
    rare = {name: seen[name] for name in (*map(str, FinishReason), *HAPPENED) if seen[name] < NUM_SEEDS // 30}
    assert not rare


def _simulate(num_seeds: int) -> None:
    for seed in range(num_seeds):
        Protocol(seed).run()


def test_a_seed_is_one_world() -> None:
    assert Protocol(8).run() == Protocol(8).run()


def _record_no_tokens(original: Any) -> Any:
    def record(self: JournalEntry, output: Any) -> Any:
        news = original(self, output)
        self.delivered = [[] for _ in self.delivered]
        return news

    return record


def _record_no_end(original: Any) -> Any:
    def record(self: JournalEntry, output: Any) -> Any:
        news = original(self, output)
        self.live.add(output.index)
        return news

    return record


def _replay_what_ended(original: Any) -> Any:
    return lambda self: original(self)[:1]


def _replay_as_new(original: Any) -> Any:
    def give(self: JournalEntry) -> Any:
        submit, *aborts = original(self)
        return [Submit(replace(submit.request, readmitted=False)), *aborts]

    return give


def _repeat_scores(original: Any) -> Any:
    return lambda self, output: output


def _blame_whom_comes_first(original: Any) -> Any:
    def judge(self: Blame, begun: list[str], **how: Any) -> Any:
        verdict = original(self, begun, **how)
        return verdict._replace(culprit=begun[0]) if begun else verdict

    return judge


def _blame_one_of_many(original: Any) -> Any:
    def judge(self: Blame, begun: list[str], **how: Any) -> Any:
        self._num_given = min(self._num_given, 1)
        return original(self, begun, **how)

    return judge


def _blame_for_what_came_from_outside(original: Any) -> Any:
    return lambda self, **how: original(self, outside=False)


def _hold_for_ever(original: Any) -> Any:
    return lambda self, request_id: original(self, request_id) and False


def _hold_nobody(original: Any) -> Any:
    return lambda self, request_id: True


def _report_nothing_of_messages(original: Any) -> Any:
    def handle(self: EngineCore, message: Any) -> None:
        original(self, message)
        self._early.clear()

    return handle


def _report_twice(original: Any) -> Any:
    def step(self: EngineCore) -> StepOutput:
        report = original(self)
        return msgspec.structs.replace(report, outputs=(*report.outputs, *report.outputs))

    return step


def _tell_no_one_who_was_set_aside(original: Any) -> Any:
    return lambda self, plan: None


def _sleep_for_ever(original: Any) -> Any:
    return property(lambda self: self.has_work and not self._waits_for_copies)


def _keep_what_is_released(original: Any) -> Any:
    return lambda self, seq_id: None


_BUGS = [
    (JournalEntry, "record", _record_no_tokens),
    (JournalEntry, "record", _record_no_end),
    (JournalEntry, "give", _replay_what_ended),
    (JournalEntry, "give", _replay_as_new),
    (JournalEntry, "_without_repeats", _repeat_scores),
    (Journal, "lost", _blame_for_what_came_from_outside),
    (Blame, "judge", _blame_whom_comes_first),
    (Blame, "judge", _blame_one_of_many),
    (Blame, "clear", _hold_for_ever),
    (Blame, "may_be_given", _hold_nobody),
    (EngineCore, "handle", _report_nothing_of_messages),
    (EngineCore, "step", _report_twice),
    (EngineCore, "can_step", _sleep_for_ever),
    (EngineCore, "_set_aside", _tell_no_one_who_was_set_aside),
    (protocol._Computing, "release", _keep_what_is_released),
]


@pytest.mark.parametrize(("owner", "name", "bug"), _BUGS, ids=[bug.__name__[1:] for *_, bug in _BUGS])
def test_a_planted_bug_is_found(
    owner: Any, name: str, bug: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, bug(getattr(owner, name)))
    with pytest.raises((AssertionError, LookupError)):
        _simulate(200)


def test_a_failure_prints_how_to_replay_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EngineCore, "step", _report_twice(EngineCore.step))
    assert protocol.main(["--seeds", "200"]) == 1
    printed = capsys.readouterr().err
    replay = printed.splitlines()[-1].removeprefix("replay: python -m tests.sim.protocol ").split()
    assert replay[0] == "--seed"
    with pytest.raises(AssertionError):
        protocol.main(replay)
