"""The target without some layers as its own drafter: what it guesses, and what it never touches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from engine.drafting.guess import ROOT, Want
from engine.drafting.skips.layer_search import LayerSearch
from engine.drafting.skips.scratch_pages import num_scratch_pages
from engine.drafting.skips.skipped_layers import SkippedLayers, head_layers
from engine.drafting.surroundings import Surroundings
from engine.messages import Submit
from engine.models.config import Layer, Rope
from tests.engine.tiny import SETTINGS, TINY, abort, core_around, random_weights, request

ROPE = Rope(theta=10000.0, num_rotated=16)
DEEP = replace(TINY, layers=(Layer(rope=ROPE),) * 6)
SLIDING = replace(
    TINY, layers=(Layer(rope=ROPE), Layer(rope=ROPE, window=21), Layer(rope=ROPE, chunk=32)) * 2
)
PROMPTS = [
    [11, 12, 13, 14, 15, 16, 17, 18] * 5,
    [21, 22, 23, 21, 22],
    list(range(30, 90)),
    [7] * 15,
    [8] * 16,
]
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7},
    "hot": {"temperature": 1.5, "top_p": 0.95, "presence_penalty": 0.5, "repetition_penalty": 1.1},
}


def core_of(config=DEEP, weights=None, **settings):
    return core_around(
        config, weights or random_weights(config), replace(SETTINGS, **({"num_pages": 64} | settings))
    )


class Eager(LayerSearch):
    """No token is too unlikely to be drafted."""

    def share(self, skipped):
        return 0.0


def drafter_of(core, skipped=(), search=Eager):
    return SkippedLayers(
        Surroundings.of(core.runner, None), search(core.runner.model.config.num_layers, skipped=skipped)
    )


def drafted(core, drafter, requests, limit=8, on_step=lambda number: None):
    """Runs the requests without speculation and asks for guesses before every step -> (guess, what the target
    said then) of each."""
    for one in requests:
        core.handle(Submit(one))
    guesses, texts = [], {}
    for number in range(400):
        ready = core.scheduler.draftable("autoregressive")
        before = core.runner.storage.pages[: core.runner.storage.scratch.start].clone()
        for sequence, guess in zip(ready, drafter.guess([Want(one, limit) for one in ready]), strict=True):
            assert len(guess.tokens) <= limit
            guesses.append((guess, sequence, len(sequence.tokens)))
            texts[sequence.seq_id] = sequence.tokens
        after = core.runner.storage.pages[: core.runner.storage.scratch.start]
        assert torch.equal(before, after), "a page of somebody was changed"
        on_step(number)
        core.step()
        if not core.has_work:
            break
    assert not core.has_work
    return [(guess, tuple(sequence.tokens[at:])) for guess, sequence, at in guesses]


def line_of(guess):
    """The tokens along the likeliest children."""
    found, at = [], ROOT
    while (child := next((k for k, parent in enumerate(guess.parents) if parent == at), None)) is not None:
        found.append(guess.tokens[child])
        at = child
    return tuple(found)


def asked(sampling, **fields):
    return [
        request(f"r{number}", prompt, max_tokens=10, seed=number, **sampling, **fields)
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize(
    ("config", "name", "page_size"),
    [(DEEP, "greedy", 4), (DEEP, "hot", 16), (SLIDING, "warm", 4), (SLIDING, "greedy", 16)],
)
def test_with_nothing_skipped_every_draft_is_what_the_target_says(config, name, page_size):
    core = core_of(config, page_size=page_size)
    told = drafted(core, drafter_of(core), asked(SAMPLINGS[name]))
    assert sum(len(line_of(guess)) for guess, _ in told) > 200
    for guess, said in told:
        line = line_of(guess)
        assert line
        assert line[: len(said)] == said[: len(line)]


@pytest.mark.parametrize("seed", range(4))
def test_any_skipped_layers_touch_no_page_and_guess_well_formed_trees(seed):
    rng = random.Random(seed)
    config = SLIDING if seed % 2 else DEEP
    core = core_of(config, page_size=8)
    drafter = drafter_of(core, rng.sample(range(1, 5), rng.randrange(1, 5)))
    for guess, _ in drafted(core, drafter, asked(SAMPLINGS["warm"]), limit=rng.randrange(1, 12)):
        assert len(guess.tokens) == len(guess.parents) == len(guess.kinds) == len(guess.beliefs) > 0
        assert all(ROOT <= parent < number for number, parent in enumerate(guess.parents))
        assert len(set(zip(guess.parents, guess.tokens, strict=True))) == len(guess.tokens)
        assert all(0 <= token < config.vocab_size for token in guess.tokens)


def test_where_scratch_pages_are_few_sequences_take_turns_and_lines_are_shorter():
    core = core_of(page_size=4)
    everything = core.runner.storage.scratch
    core.runner.storage.scratch = everything[:2]
    told = drafted(core, drafter_of(core), asked(SAMPLINGS["greedy"]))
    assert all(line_of(guess) for guess, _ in told)
    assert min(len(line_of(guess)) for guess, _ in told) < 6, "two pages of 4, of which one has begun"
    assert all(line_of(guess)[: len(said)] == said[: len(line_of(guess))] for guess, said in told)


def test_without_scratch_pages_nothing_is_guessed():
    core = core_of()
    core.runner.storage.scratch = range(0)
    told = drafted(core, drafter_of(core), asked(SAMPLINGS["greedy"])[:2])
    assert told
    assert not any(guess.tokens for guess, _ in told)


def test_drafts_end_with_the_context():
    config = replace(DEEP, max_positions=64)
    core = core_of(config)
    told = drafted(core, drafter_of(core), [request("a", list(range(40)), max_tokens=100, temperature=0.0)])
    assert [len(line_of(guess)) for guess, _ in told][-3:] == [4, 3, 2]


def test_preempted_and_shared_prefixes_and_aborts_change_nothing():
    core = core_of(num_pages=8, max_num_batched_tokens=24)
    requests = [
        request(f"r{number}", PROMPTS[0][:20], max_tokens=36, seed=number, num_choices=2)
        for number in range(2)
    ]
    ending = lambda number: abort(core, "r1") if number == 30 else None  # noqa: E731
    told = drafted(core, drafter_of(core), requests, 3, on_step=ending)
    assert core.scheduler.stats().num_preemptions
    assert core.scheduler.stats().prefix_hit_tokens
    assert all(line_of(guess)[: len(said)] == said[: len(line_of(guess))] for guess, said in told)


def test_an_unlikely_token_ends_the_line():
    config = replace(DEEP, vocab_size=300)
    weights = random_weights(config)
    weights["head"] = weights["head"] * 1e-4  # every token is about as likely
    core = core_of(config, weights)
    told = drafted(core, drafter_of(core, (2, 4), LayerSearch), asked(SAMPLINGS["greedy"])[:2])
    assert {len(line_of(guess)) for guess, _ in told} == {1}


def test_numbers_that_are_not_finite_are_no_guess_and_do_not_last():
    core = core_of()
    drafter = drafter_of(core)
    storage = core.runner.storage
    storage.pages[storage.scratch.start :] = float("nan")
    told = drafted(core, drafter, asked(SAMPLINGS["greedy"])[:2])
    assert all(line_of(guess)[: len(said)] == said[: len(line_of(guess))] for guess, said in told)
    core.runner.model.final_norm.fill_(float("nan"))
    core.handle(Submit(request("b", [1, 2, 3], max_tokens=4)))
    core.step()


def test_layers_that_do_nothing_are_found_while_serving():
    config = replace(TINY, layers=(Layer(rope=ROPE),) * 7)
    weights = random_weights(config)
    idle = {1, 3, 4}
    for layer in idle:
        weights[f"layers.{layer}.out.weight"].zero_()
        weights[f"layers.{layer}.down.weight"].zero_()
    core = core_of(config, weights)
    drafter = SkippedLayers(Surroundings.of(core.runner, None))

    def hear(number):
        drafter._num_committed = 10**6  # of others

    for seed, name in enumerate([*SAMPLINGS] * 4):
        sampling = {**SAMPLINGS[name], "presence_penalty": 0.0, "repetition_penalty": 1.0}
        prompt = [seed + 1, 2, 3]
        drafted(core, drafter, [request(f"{seed}", prompt, max_tokens=80, seed=seed, **sampling)], 1, hear)
        if drafter.search.skipped == idle:
            break
    assert drafter.search.skipped == idle


def test_where_no_layer_can_be_skipped_nothing_is_guessed_and_the_search_goes_on():
    core = core_of()
    drafter = drafter_of(core, (), LayerSearch)

    def hear(number):
        drafter._num_committed = 10**6  # of others

    told = drafted(core, drafter, [request("a", [1, 2, 3], max_tokens=40)], 4, hear)
    assert not any(guess.tokens for guess, _ in told)
    assert drafter.search.num_rejected


def test_trials_grow_rare_where_nothing_better_is_found():
    core = core_of()
    drafter = drafter_of(core)
    first = drafter._trial_every()
    drafter.search.num_rejected = 50
    assert drafter._trial_every() > 4 * first
    drafter.search.num_rejected = 10**6
    assert drafter._trial_every() <= 4096


def test_the_cost_of_the_head_is_told_in_layers():
    assert head_layers(core_of().runner.model) == pytest.approx(300 / (2 * 6 * 16 + 3 * 64))
    assert num_scratch_pages(SLIDING) == 3 * num_scratch_pages(DEEP)
