"""Whatever drafters guess, the text is that of plain decoding; and of ended sequences nothing is kept."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.drafting.guess import CATCHING_UP, NO_GUESS, ROOT, Guess
from engine.messages import Submit
from tests.engine.drafting.eager import eager
from tests.engine.tiny import SETTINGS, TINY, abort, core_around, random_weights, request, run, tiny_core

CONTEXT = 152  # behind a key block, and no multiple of one; a multiple of a page


class Random:
    """Trees of all shapes, in which what the text goes on with, if it is known, is somewhere."""

    taps: tuple[int, ...] = ()

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.texts: dict[str, list[int]] = {}

    def guess(self, wants):
        return [self._guess(want) for want in wants]

    def _guess(self, want):
        chance = self.random.random()
        if chance < 0.1:
            return CATCHING_UP if chance < 0.05 else NO_GUESS
        sequence, bushy = want.sequence, self.random.random()
        right = self.texts.get(sequence.request.request_id, [])[sequence.num_output :]
        tokens, parents, at, depth = [], [], ROOT, 0
        for draft in range(want.limit):
            parent = at if self.random.random() > bushy else self.random.randrange(ROOT, draft)
            token = self.random.randrange(300)
            if parent == at and depth < len(right) and self.random.random() < 0.8:
                token, at, depth = right[depth], draft, depth + 1
            tokens.append(token)
            parents.append(parent)
        kinds = tuple(self.random.randrange(5) for _ in tokens)
        return Guess(tuple(tokens), tuple(parents), kinds, tuple(self.random.random() for _ in tokens))

    def observe(self, seen):
        for one in seen:
            assert len(one.drawn) in (0, len(one.parents) + 1)

    def release(self, sequence):
        pass


def made(drafters=(), **settings):
    config = replace(TINY, max_positions=CONTEXT)
    found = {f"random{number}": one for number, one in enumerate(drafters)}
    scheduling = replace(SETTINGS, **settings)
    return eager(core_around(config, random_weights(config), scheduling, drafters=lambda _: found))


def requests(method: str, **fields):
    return [
        request(
            f"r{number}",
            [(number + 3) * k % 300 for k in range(length)],
            method=method,
            max_tokens=CONTEXT,
            logprobs=1,
            seed=number,
            temperature=(0.0, 1.0)[number % 2],
            **fields,
        )
        for number, length in enumerate((100, 120, 140, 149, 150))
    ]


def told(core, asked):
    return {key: (one.tokens, one.logprobs, one.finish) for key, one in run(core, *asked).items()}


def is_empty(core) -> bool:
    speculation = core.speculation
    kept = (speculation._met, speculation._asked, speculation.acceptance._own)
    return not any(kept) and not speculation.drafters["prompt_lookup"].num_tokens


@pytest.fixture(scope="module")
def plain():
    return told(made(), requests("autoregressive"))


@pytest.mark.parametrize("settings", [{}, {"num_pages": 14}, {"max_num_batched_tokens": 20}])
@pytest.mark.parametrize("seed", range(3))
def test_trees_of_many_drafters_up_to_the_end_of_the_context(seed, settings, plain):
    drafters = [Random(seed * 10 + number) for number in range(5)]
    for one in drafters:
        one.texts = {name: tokens for (name, _), (tokens, *_) in plain.items()}
    core = made(drafters, **settings)
    planned = watch(core)
    assert told(core, requests("speculative")) == plain
    assert is_empty(core)
    assert max(piece.num_window for piece in planned) > 6
    for piece in planned:
        end = piece.start + len(piece.tokens)
        assert end <= CONTEXT, "drafts behind the context"
        if piece.ancestors:
            block = core.runner.tree_block
            assert (end - piece.num_window) // block == (end - 1) // block, "a tree in two blocks of keys"


def test_all_drafters_together_draft_no_more_than_the_request_allows(plain):
    core = made([Random(number) for number in range(5)])
    planned = watch(core)
    assert told(core, requests("speculative", max_draft_tokens=3)) == plain
    assert max(piece.num_window for piece in planned) == 3


def watch(core):
    """-> slices, as they are planned"""
    found, plan = [], core.scheduler.plan

    def watched():
        made = plan()
        found.extend(made.slices)
        return made

    core.scheduler.plan = watched
    return found


class Broken(Random):
    """Goes wrong in one way after some guesses."""

    def __init__(self, way: str) -> None:
        super().__init__(1)
        self.way = way
        self.calls = 0

    def guess(self, wants):
        guesses = super().guess(wants)
        self.calls += 1
        if self.calls < 3:
            return guesses
        if self.way == "guess":
            raise RuntimeError("broken")
        if self.way == "count":
            return guesses[1:]
        wrong = {
            "token": Guess((300,), (ROOT,), (0,), (0.9,)),
            "no token": Guess((-1,), (ROOT,), (0,), (0.9,)),
            "parent": Guess((5, 6), (ROOT, 1), (0, 0), (0.9, 0.9)),
            "kinds": Guess((5, 6), (ROOT, 0), (0,), (0.9, 0.9)),
            "limit": Guess((5,) * 99, tuple(range(ROOT, 98)), (0,) * 99, (0.9,) * 99),
        }
        return [wrong.get(self.way, guess) for guess in guesses]

    def observe(self, seen):
        if self.way == "observe" and self.calls > 3:
            raise RuntimeError("broken")

    def release(self, sequence):
        if self.way == "release":
            raise RuntimeError("broken")


@pytest.mark.parametrize(
    "way", ["guess", "count", "token", "no token", "parent", "kinds", "limit", "observe", "release"]
)
def test_a_drafter_that_goes_wrong_costs_nobody_anything(way, plain):
    core = made([Broken(way)])
    heard = {}
    for one in requests("speculative"):
        core.handle(Submit(one))
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None
            heard.setdefault((output.request_id, output.index), []).extend(output.tokens)
    assert heard == {key: tokens for key, (tokens, *_) in plain.items()}
    assert core.speculation.failed == {"random0"}
    assert is_empty(core)


def test_who_leaves_or_is_put_aside_at_any_time_leaves_nothing_behind():
    rng = random.Random(3)
    core = eager(
        tiny_core(num_pages=60, page_size=4, max_num_seqs=6, drafters=lambda _: {"random0": Random(0)})
    )
    for number in range(24):
        asked = request(f"r{number}", [rng.randrange(300) for _ in range(40)], max_tokens=60, seed=number)
        core.handle(Submit(replace(asked, method="speculative", num_choices=rng.choice([1, 2]))))
        for _ in range(rng.randrange(5)):
            core.step()
        if rng.random() < 0.4:
            abort(core, f"r{rng.randrange(number + 1)}")
    while core.has_work:
        core.step()
    assert core.scheduler.stats().num_preemptions > 0
    assert is_empty(core)
    assert not core.speculation.failed
