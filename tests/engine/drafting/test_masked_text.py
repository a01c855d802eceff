"""Token masks hold on every path of drafts, and roll back: masked text with drafts is masked text without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.drafting import LIGHT
from engine.drafting.skips.skipped_layers import SkippedLayers
from scheduler.types import FinishReason, LossyAcceptance
from tests.engine.drafting import test_speculative_text
from tests.engine.drafting.eager import eager
from tests.engine.drafting.skips.test_skipped_layers import Eager
from tests.engine.drafting.test_speculative_text import PROMPTS
from tests.engine.tiny import TINY, request, run, tiny_core

if TYPE_CHECKING:
    from scheduler.types import Sequence

OPEN, CLOSE, STOP = 20, 21, 22
DIGITS = range(10, 16)
LETTERS = range(60, 70)
DEPTH = 3
SAMPLINGS = {name: test_speculative_text.SAMPLINGS[name] for name in ("greedy", "warm", "hot")}


class Automaton:
    """Letters, digits in pairs, brackets that balance, at most DEPTH deep; STOP where all are closed. Its
    state is (depth, whether a digit waits for its second); None: a token that it forbids came."""

    def __init__(self, sequence: Sequence, dead_end: int = -1) -> None:
        self.sequence = sequence
        self.dead_end = dead_end  # nothing may follow this token
        self.state: tuple[int, bool] | None = (0, False)
        self.read = sequence.prompt_len
        self.asked: list[tuple[int, ...]] = []

    def allowed(self, drafted: tuple[int, ...]) -> torch.Tensor | None:
        self.asked.append(drafted)
        for token in self.sequence.tokens[self.read :]:
            self.state = self._after(self.state, token)
        assert self.state is not None, "a token was committed that the mask forbids"
        self.read = len(self.sequence.tokens)
        state = self.state
        for token in drafted:
            state = self._after(state, token)
        if state is None:
            return None  # whatever is said here means nothing
        mask = torch.zeros(TINY.vocab_size, dtype=torch.bool)
        mask[self._following(state)] = True
        last = drafted[-1] if drafted else self.sequence.tokens[-1]
        return mask if last != self.dead_end else torch.zeros_like(mask)

    def _following(self, state: tuple[int, bool]) -> list[int]:
        depth, halfway = state
        if halfway:
            return list(DIGITS)
        brackets = [OPEN] * (depth < DEPTH) + [CLOSE] * (depth > 0) + [STOP] * (depth == 0)
        return [*DIGITS, *LETTERS, *brackets]

    def _after(self, state: tuple[int, bool] | None, token: int) -> tuple[int, bool] | None:
        if state is None or token not in self._following(state):
            return None
        depth, halfway = state
        return depth + (token == OPEN) - (token == CLOSE), token in DIGITS and not halfway


def masked(core, **of_mask):
    """Every request whose name begins with "m" has a mask; -> those that were made, by name and choice."""
    masks = {}

    def mask_of(sequence):
        if not sequence.request.request_id.startswith("m"):
            return None
        mask = masks[sequence.request.request_id, sequence.index] = Automaton(sequence, **of_mask)
        return mask

    core.runner.mask_of = mask_of
    eager(core)
    return masks


def asked(method, sampling, **fields):
    return [
        request(
            f"{'mp'[number % 3 == 2]}{number}",
            prompt,
            method=method,
            seed=number,
            logprobs=1,
            **{"max_tokens": 30, "stop_token_ids": (STOP,)} | sampling | fields,
        )
        for number, prompt in enumerate(PROMPTS * 2)
    ]


def told(core, requests):
    heard = run(core, *requests)
    return {key: (one.tokens, one.logprobs, one.finish, one.error) for key, one in heard.items()}


@pytest.fixture(scope="module")
def plain():
    core = tiny_core()
    masked(core)
    return {name: told(core, asked("autoregressive", sampling)) for name, sampling in SAMPLINGS.items()}


@pytest.mark.parametrize("drafter", ["auto", *LIGHT, "skipped_layers"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_drafter_gives_the_masked_text_of_plain_decoding(name, drafter, plain):
    search = Eager(TINY.num_layers)
    core = tiny_core(drafters=lambda around: {"skipped_layers": SkippedLayers(around, search)})
    masks = masked(core)
    drafted = 0
    for _ in range(2):  # the second time the first answers are known
        assert told(core, asked("speculative", SAMPLINGS[name], drafter=drafter)) == plain[name]
        drafted += sum(len(path) > 0 for mask in masks.values() for path in mask.asked)
        masks.clear()
    assert drafted, "the mask was never asked about a draft"


def test_the_text_is_one_that_the_mask_allows(plain):
    [tokens] = {tuple(plain["warm"]["m0", 0][0])}
    depth = 0
    for token in tokens:
        assert token in {OPEN, CLOSE, STOP, *DIGITS, *LETTERS}
        depth += (token == OPEN) - (token == CLOSE)
        assert 0 <= depth <= DEPTH
    assert any(token in DIGITS for token in tokens)


def test_a_mask_goes_on_from_what_was_committed_after_an_accepted_run():
    core = tiny_core()
    masks = masked(core)
    fields = {"temperature": 0.0, "max_tokens": 40, "method": "speculative"}
    [first] = run(core, request("m", PROMPTS[0], **fields)).values()
    steps = core.scheduler._num_steps
    masks.clear()
    [again] = run(core, request("m", PROMPTS[0], **fields)).values()
    assert again.tokens == first.tokens
    assert core.scheduler._num_steps - steps < len(again.tokens) // 2, "runs were accepted"
    [mask] = masks.values()
    assert mask.read > mask.sequence.prompt_len + len(again.tokens) // 2


def test_lossy_text_obeys_its_mask_too():
    core = tiny_core()
    masks = masked(core)
    lax = LossyAcceptance(rule="threshold", threshold=1e-9)
    for _ in range(2):
        heard = run(core, *asked("speculative", SAMPLINGS["hot"], lossy=lax))
        assert all(one.error is None for one in heard.values())
    assert all(mask.read > mask.sequence.prompt_len for mask in masks.values()), (
        "and looks at what was committed"
    )


@pytest.mark.parametrize("method", ["autoregressive", "speculative"])
def test_a_dead_end_ends_its_sequence_alone_and_where_plain_decoding_meets_it(method, plain):
    tokens = plain["greedy"]["m0", 0][0]
    dead_end = tokens[len(tokens) // 2]
    core = tiny_core()
    masked(core, dead_end=dead_end)
    for _ in range(2):  # the second time the run across the dead end is drafted
        heard = run(core, *asked(method, SAMPLINGS["greedy"]))
        met = heard["m0", 0]
        assert met.finish is FinishReason.ERROR
        assert "allow no token" in met.error
        assert met.tokens == tokens[: tokens.index(dead_end) + 1]
        assert heard["p2", 0].tokens == plain["greedy"]["p2", 0][0]


def test_a_mask_that_raises_ends_its_sequence_alone():
    class Broken:
        def allowed(self, drafted):
            raise KeyError("state")

    core = tiny_core()
    core.runner.mask_of = lambda sequence: Broken() if sequence.request.request_id == "m" else None
    eager(core)
    fields = {"temperature": 0.0, "max_tokens": 8, "method": "speculative"}
    heard = run(core, request("m", PROMPTS[0], **fields), request("p", PROMPTS[1], **fields))
    assert heard["m", 0].finish is FinishReason.ERROR
    assert heard["p", 0].finish is FinishReason.LENGTH
