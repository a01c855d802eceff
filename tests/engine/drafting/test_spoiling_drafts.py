"""A token of which the model makes numbers that are not finite harms a text if plain decoding comes to it,
and only then: as a guess that is wrong it is as if it had never been computed."""

from __future__ import annotations

import pytest
import torch

from engine.drafting.guess import ROOT, Guess, line
from scheduler.types import FinishReason, LossyAcceptance
from tests.engine.drafting.eager import eager
from tests.engine.tiny import request, run, tiny_core

PROMPT = [11, 12, 13, 14, 15, 16, 17, 18] * 3
SAMPLINGS = [{"temperature": 0.0}, {"temperature": 1.2, "seed": 3, "presence_penalty": 0.4}]
DRAFTED = {"method": "speculative", "drafter": "poisoner"}


class Poisoner:
    """Guesses `bad` wherever it may: alone, in the middle of a line, and beside what is right."""

    taps: tuple[int, ...] = ()

    def __init__(self, bad: int, text: list[int]) -> None:
        self.bad = bad
        self.text = text
        self.num_guesses = 0

    def guess(self, wants):
        return [self._guess(want.sequence.num_output) for want in wants]

    def _guess(self, done: int) -> Guess:
        self.num_guesses += 1
        right = self.text[done : done + 3]
        if self.num_guesses % 3 == 0 or len(right) < 3:
            return line([self.bad], [0], 0.9)
        if self.num_guesses % 3 == 1:
            return line([*right[:2], self.bad, 5], [0] * 4, 0.9)
        tokens = (self.bad, right[0], self.bad, right[1], 7)
        return Guess(tokens, (ROOT, ROOT, 1, 1, 2), (0,) * 5, (0.9,) * 5)

    def observe(self, seen):
        assert all(torch.isfinite(one.logits).all() for one in seen if one.logits is not None)

    def release(self, sequence):
        pass


def told(core, *asked):
    heard = run(core, *asked)
    return {key: (one.tokens, one.logprobs, one.finish) for key, one in heard.items()}


def asked(number: int, sampling, **fields):
    fields = {"max_tokens": 30, "logprobs": 2} | sampling | fields
    return request(f"r{number}", [*PROMPT, 20 + number], **fields)


def poisoned(bad: int, value: float, text: list[int], **settings):
    core = tiny_core(drafters=lambda _: {"poisoner": Poisoner(bad, text)}, **settings)
    core.runner.model.embedding[bad] = value
    return eager(core)


def unused(*texts: list[int]) -> int:
    return next(token for token in range(299, 0, -1) if not any(token in text for text in texts))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        (SAMPLINGS[0], {}),
        (SAMPLINGS[1], {}),
        (SAMPLINGS[0], {"lossy": LossyAcceptance(rule="threshold", threshold=1.0)}),
    ],
)
def test_a_wrong_guess_that_is_not_finite_changes_no_text_and_no_later_one(value, sampling, fields):
    """Pages are few, so that the next request has those of the first, some of them in their middle."""
    plain = tiny_core()
    expected = [told(plain, asked(number, sampling)) for number in range(6)]
    text = expected[0]["r0", 0][0]
    bad = unused(PROMPT, *(tokens for one in expected for tokens, _, _ in one.values()))
    core = poisoned(bad, value, text, num_pages=6)
    for number, found in enumerate(expected):
        assert told(core, asked(number, sampling, **DRAFTED, **fields)) == found
    drafter = core.speculation.drafters["poisoner"]
    assert 6 <= drafter.num_guesses < 30, "who was spoiled once is not drafted for again"
    assert torch.isfinite(core.runner.storage.pages).all()


def test_those_beside_it_go_on_speculating():
    plain = tiny_core()
    expected = told(plain, *(asked(number, SAMPLINGS[0]) for number in range(6)))
    texts = [tokens for tokens, _, _ in expected.values()]
    core = poisoned(unused(PROMPT, *texts), torch.nan, texts[0])
    some = [asked(number, SAMPLINGS[0], **DRAFTED) for number in range(3)]
    others = [asked(number, SAMPLINGS[0]) for number in range(3, 6)]
    assert told(core, *some, *others) == expected


@pytest.mark.parametrize("place", [1, 2, 9, 29])
def test_a_text_that_comes_to_such_a_token_ends_there_as_it_does_without_guesses(place):
    text = told(tiny_core(), asked(0, SAMPLINGS[0]))["r0", 0][0]
    bad = text[place]
    assert bad not in PROMPT
    core = poisoned(bad, torch.nan, text)
    expected = run(core, asked(0, SAMPLINGS[0]))["r0", 0]
    found = run(core, asked(0, SAMPLINGS[0], **DRAFTED))["r0", 0]
    assert (found.tokens, found.finish, found.error) == (expected.tokens, expected.finish, expected.error)
    assert found.tokens == text[: text.index(bad) + 1]
    if text.index(bad) < 29:
        assert found.finish is FinishReason.ERROR
        assert "not finite" in str(found.error)
    core.runner.model.embedding[bad] = 0.1
    assert run(core, asked(1, SAMPLINGS[0]))["r1", 0].error is None
