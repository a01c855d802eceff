"""Chances follow what was accepted: of a kind, and of a request."""

from __future__ import annotations

import random

import pytest

from engine.drafting.acceptance import SUREST, Acceptance
from engine.drafting.guess import ROOT, Guess, line, take
from scheduler.types import LossyAcceptance
from tests.engine.drafting.eager import eager
from tests.engine.tiny import request, run, tiny_core

LINE = line([1, 2, 3], [0, 1, 2], 0.6)


def test_before_anything_is_known_drafters_are_believed():
    guess = Guess((1, 2), (ROOT, ROOT), (0, 1), (0.7, 0.1))
    assert Acceptance().chances(1, "a", guess) == [0.7, 0.1]


def test_what_happened_is_learned_for_each_kind():
    acceptance, rng = Acceptance(), random.Random(1)
    for number in range(3000):
        depth = 0
        while depth < 3 and rng.random() < (0.9, 0.5, 0.2)[depth]:
            depth += 1
        acceptance.note(number, "a", LINE, range(depth))
        acceptance.release(number)
    assert acceptance.chances(-1, "a", LINE) == pytest.approx([0.9, 0.5, 0.2], abs=0.1)
    assert acceptance.chances(-1, "b", LINE) == [0.6] * 3, "another drafter's"


def test_what_follows_a_wrong_draft_teaches_nothing():
    acceptance = Acceptance()
    for number in range(100):
        acceptance.note(number, "a", LINE, ())
    first, second, third = acceptance.chances(-1, "a", LINE)
    assert first < 0.1
    assert second == third == 0.6


def test_a_request_has_chances_of_its_own():
    acceptance = Acceptance()
    for number in range(200):
        acceptance.note(number, "a", LINE, range(3) if number % 2 else ())
    for _ in range(20):
        acceptance.note(1000, "a", LINE, range(3))
        acceptance.note(2000, "a", LINE, ())
    good, other, bad = (acceptance.chances(seq_id, "a", LINE)[0] for seq_id in (1000, 3000, 2000))
    assert bad < other / 2 < other < good <= SUREST
    acceptance.release(2000)
    assert acceptance.chances(2000, "a", LINE)[0] == other


def test_chances_of_what_was_granted_are_sobered_by_what_stood():
    acceptance = Acceptance()
    assert acceptance.sobriety == 1.0
    for _ in range(2000):
        acceptance.note_granted(2.0, 1)
    assert acceptance.sobriety == pytest.approx(0.5, abs=0.01)
    for _ in range(2000):
        acceptance.note_granted(1.0, 2)
    assert acceptance.sobriety == 1.0, "good luck makes nobody bolder"


def test_soberness_wears_off_where_nothing_is_granted_any_more():
    """One step of many sequences may make it so sober that at their load nothing is tried again."""
    acceptance = Acceptance()
    for _ in range(32):
        acceptance.note_granted(2.5, 0)
    assert acceptance.sobriety < 0.2
    for _ in range(3000):
        acceptance.note_none_granted()
    assert acceptance.sobriety > 0.8
    acceptance.note_granted(10.0, 0)
    assert acceptance.sobriety < 0.7, "it learns anew"


class Stubborn:
    """Guesses the same tokens whatever the text."""

    taps: tuple[int, ...] = ()

    def guess(self, wants):
        return [take(LINE, range(min(3, want.limit))) for want in wants]

    def observe(self, seen):
        pass

    def release(self, sequence):
        pass


def test_what_stands_by_a_lossy_rule_is_no_hope_for_others():
    core = eager(tiny_core(drafters=lambda _: {"stubborn": Stubborn()}))
    fields = {"max_tokens": 40, "temperature": 1.0, "method": "speculative", "drafter": "stubborn"}
    lax = LossyAcceptance(rule="threshold", threshold=1e-9)
    tokens = run(core, request("lax", [1, 2, 3], lossy=lax, **fields))["lax", 0].tokens
    assert tokens.count(2) >= 10, "the drafts stood"
    acceptance = core.speculation.acceptance
    assert acceptance.chances(-1, "stubborn", LINE) == [0.6] * 3
    run(core, request("exact", [1, 2, 3], **fields))
    assert acceptance.chances(-1, "stubborn", LINE)[0] < 0.3


class Late:
    """Guesses one and the same kind of line: at first wrong ones, then what the text goes on with."""

    taps: tuple[int, ...] = ()

    def __init__(self, text):
        self.text = text
        self.is_right = False

    def guess(self, wants):
        return [self._guess(want.sequence.num_output, want.limit) for want in wants]

    def _guess(self, done, limit):
        tokens = self.text[done : done + min(limit, 6)]
        shift = 0 if self.is_right else 1
        return line([(token + shift) % 300 for token in tokens], [0] * len(tokens), 0.5)

    def observe(self, seen):
        pass

    def release(self, sequence):
        pass


def test_drafts_of_a_kind_that_was_always_wrong_are_granted_again_when_it_becomes_right():
    fields = {"max_tokens": 100, "temperature": 0.0}
    text = run(tiny_core(), request("plain", [1, 2, 3], **fields))["plain", 0].tokens
    late = Late(text)
    core = eager(tiny_core(drafters=lambda _: {"late": late}))
    asked = {"method": "speculative", "drafter": "late", **fields}
    for number in range(20):
        run(core, request(f"wrong{number}", [1, 2, 3], **asked))
    assert core.speculation.acceptance.chances(-1, "late", line([1], [0], 0.5))[0] < 0.15
    late.is_right = True
    for number in range(4):
        run(core, request(f"right{number}", [1, 2, 3], **asked))
    before = core.scheduler._num_steps
    assert run(core, request("last", [1, 2, 3], **asked))["last", 0].tokens == text
    assert core.scheduler._num_steps - before < 60
