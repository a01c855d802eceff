"""Lossy acceptance: which drafts stand, by hand; what is committed after them; and the text of an engine."""

from __future__ import annotations

import math

import pytest
import torch

from engine.decoding import Draws, Lossy, Speculative, method_of
from engine.sampling.distribution import distribution
from engine.sampling.places import Place
from engine.sampling.processors import LogitsProcessor, needs_processing
from engine.sampling.sampler import sample
from scheduler.types import (
    FinishReason,
    LossyAcceptance,
    Request,
    SamplingParams,
    Sequence,
    Visibility,
    Window,
)
from tests.engine.drafting.eager import eager
from tests.engine.drafting.test_speculative_text import PROMPTS
from tests.engine.tiny import request, run, tiny_core

VOCABULARY = 8


def decided(rows, tokens, parents, rule, **sampling):
    """rows: probabilities after the last committed token, then after each draft; -> decision, draws"""
    logits = torch.tensor(rows).log()
    asked = Request(request_id="r", prompt_ids=(1,), sampling=SamplingParams(**sampling), lossy=rule)
    ancestors = []
    for node, parent in enumerate(parents):
        ancestors.append(1 << node | (ancestors[parent] if parent >= 0 else 0))
    window = Window(tokens, (0,) * len(tokens), Visibility.ANCESTORS, tuple(ancestors), optional=True)
    sequence = Sequence(0, asked, 0, [1], window=window)
    processor = None
    if needs_processing(asked.sampling):
        processor = LogitsProcessor(sequence, VOCABULARY, torch.device("cpu"))
    paths = [()]
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*paths[parent + 1], token))
    places = tuple(Place(sequence, path, processor) for path in paths)
    drawn = sample(logits, list(places))
    draws = Draws(True, tuple(drawn.tokens), logits, 0, places, frozenset(drawn.errors))
    return Lossy().decide(sequence, draws), draws


def spread(*likely, rest=VOCABULARY):
    """Probabilities: those of `likely`, then what is left, evenly."""
    return [*likely, *[(1 - sum(likely)) / (rest - len(likely))] * (rest - len(likely))]


TYPICAL = LossyAcceptance(rule="typical", epsilon=0.09, delta=0.3)
HALF = LossyAcceptance(rule="threshold", threshold=0.5)
ROW = spread(0.5, 0.3, 0.05)


def seed_that_draws(token, row=ROW):
    """A seed with which the target draws `token` at the first place."""
    logits = torch.tensor([row]).log()
    for seed in range(1000):
        asked = Request(request_id="r", prompt_ids=(1,), sampling=SamplingParams(seed=seed))
        if sample(logits, [Place(Sequence(0, asked, 0, [1]))]).tokens == [token]:
            return seed
    raise AssertionError


@pytest.mark.parametrize(
    ("rule", "draft", "stands"),
    [
        (TYPICAL, 1, True),  # 0.3 > min(0.09, ..)
        (TYPICAL, 2, False),  # 0.05 is less than 0.09 and 0.3 / e^1.37 = 0.076
        (LossyAcceptance(rule="typical", epsilon=0.04), 2, True),
        (LossyAcceptance(rule="typical", delta=0.1), 2, True),
        (HALF, 1, True),  # 0.3 of at most 0.5
        (HALF, 2, False),
        (LossyAcceptance(rule="threshold", threshold=0.09), 2, True),
    ],
)
def test_a_draft_stands_by_its_probability(rule, draft, stands):
    seed = seed_that_draws(0)
    decision, draws = decided([ROW, ROW], (draft,), (-1,), rule, seed=seed)
    assert draws.tokens[0] == 0, "the target draws another token"
    assert decision.kept == ((0,) if stands else ())
    assert decision.committed == ((draft, draws.tokens[1]) if stands else (0,))


def test_the_bound_of_typical_acceptance_is_that_of_the_paper():
    entropy = -sum(p * math.log(p) for p in ROW)
    bound = min(0.09, 0.3 * math.exp(-entropy))
    for token, probability in enumerate(ROW[:3]):
        if token:
            decision, _ = decided([ROW, ROW], (token,), (-1,), TYPICAL, seed=seed_that_draws(0))
            assert bool(decision.kept) == (probability > bound)


def test_of_a_tree_the_likeliest_child_is_followed_unless_the_target_draws_another():
    rows, tokens, parents = [ROW] * 5, (2, 1, 0, 1), (-1, -1, 1, 1)
    drawn_elsewhere = seed_that_draws(5)
    decision, _ = decided(
        rows, tokens, parents, LossyAcceptance(rule="threshold", threshold=0.01), seed=drawn_elsewhere
    )
    assert decision.kept[0] == 1
    assert decision.committed[0] == 1
    decision, _ = decided(
        rows, tokens, parents, LossyAcceptance(rule="threshold", threshold=0.01), seed=seed_that_draws(2)
    )
    assert decision.kept == (0,)


def test_what_is_cut_or_banned_never_stands():
    everything = LossyAcceptance(rule="threshold", threshold=1e-9)
    seed = seed_that_draws(0)
    for limits in ({"top_k": 1}, {"top_p": 0.4}, {"bad_words": ((1,),)}, {"allowed_token_ids": (0, 2)}):
        decision, _ = decided([ROW, ROW], (1,), (-1,), everything, seed=seed, **limits)
        assert decision.kept == ()


def test_a_greedy_request_stays_lossless_under_typical_acceptance_alone():
    assert decided([ROW, ROW], (1,), (-1,), TYPICAL, temperature=0.0)[0].committed == (0,)
    assert decided([ROW, ROW], (1,), (-1,), HALF, temperature=0.0)[0].committed == (1, 0)
    assert decided([ROW, ROW], (2,), (-1,), HALF, temperature=0.0)[0].committed == (0,)


def test_a_draft_that_leads_nowhere_is_not_followed():
    """After token 1 the request allows nothing: what stands there is for the next step to fail at."""
    limits = {"allowed_token_ids": (0, 1), "bad_words": ((1, 0), (1, 1))}
    decision, draws = decided([ROW, ROW], (1,), (-1,), HALF, seed=seed_that_draws(0), **limits)
    assert draws.undrawn == {1}
    assert decision.kept == ()


def test_the_distribution_is_that_of_the_draws():
    """10,000 seeds against it, with truncation and penalties."""
    sampling = {"temperature": 0.8, "top_k": 3, "repetition_penalty": 1.5, "logit_bias": ((4, 1.0),)}
    logits = torch.tensor([ROW]).log()

    def place(seed):
        asked = Request(request_id="r", prompt_ids=(1,), sampling=SamplingParams(seed=seed, **sampling))
        sequence = Sequence(0, asked, 0, [1])
        return Place(sequence, (), LogitsProcessor(sequence, VOCABULARY, torch.device("cpu")))

    expected = distribution(logits[0], place(0))
    count = 10_000
    drawn = sample(logits.expand(count, -1), [place(seed) for seed in range(count)]).tokens
    seen = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY) / count
    assert float((seen - expected).abs().max()) < 4 * 0.5 / math.sqrt(count)
    assert int((expected > 0).sum()) == 3


def test_only_a_lossy_request_is_decoded_so():
    def asked(**fields):
        return Request(request_id="r", prompt_ids=(1,), sampling=SamplingParams(), **fields)

    assert isinstance(method_of(asked(method="speculative", lossy=HALF)), Lossy)
    assert isinstance(method_of(asked(method="speculative")), Speculative)
    assert not isinstance(method_of(asked(lossy=HALF)), Lossy)


@pytest.mark.parametrize("rule", [TYPICAL, HALF, LossyAcceptance(rule="threshold", threshold=1e-6)])
def test_lossy_requests_run_beside_others_and_harm_none(rule):
    core = tiny_core()
    fields = {"temperature": 0.9, "max_tokens": 40, "logprobs": 1}
    expected = {
        number: run(core, request("p", prompt, seed=number, **fields))["p", 0]
        for number, prompt in enumerate(PROMPTS)
    }
    core = tiny_core()
    eager(core)
    spoken = {"method": "speculative", **fields}
    for _ in range(2):
        requests = [
            request(f"p{number}", prompt, seed=number, **spoken) for number, prompt in enumerate(PROMPTS)
        ]
        requests += [
            request(f"l{number}", prompt, seed=number + 7, lossy=rule, **spoken)
            for number, prompt in enumerate(PROMPTS)
        ]
        heard = run(core, *requests)
        for number, whole in expected.items():
            assert heard[f"p{number}", 0].tokens == whole.tokens
            lossy = heard[f"l{number}", 0]
            assert lossy.finish is FinishReason.LENGTH
            assert [one.token for one in lossy.logprobs] == lossy.tokens
            assert len(lossy.tokens) == 40


def test_log_probabilities_are_the_models_of_what_was_said():
    core = tiny_core()
    eager(core)
    lax = LossyAcceptance(rule="threshold", threshold=1e-6)
    fields = {"temperature": 1.5, "max_tokens": 40, "method": "speculative", "lossy": lax, "logprobs": 1}
    said = [run(core, request("l", PROMPTS[0], seed=seed, **fields))["l", 0] for seed in range(3)][-1]
    whole = [*PROMPTS[0], *said.tokens]
    scored = run(tiny_core(), request("s", whole, max_tokens=1, prompt_logprobs=1))["s", 0]
    assert said.logprobs == scored.prompt_logprobs[len(PROMPTS[0]) - 1 :]


def test_a_lax_rule_accepts_what_a_strict_one_does_not():
    def num_steps(lossy):
        core = tiny_core()
        eager(core)
        fields = {"temperature": 1.5, "max_tokens": 40, "method": "speculative", "lossy": lossy}
        for seed in range(3):
            run(core, request("a", PROMPTS[0], seed=seed, **fields))
        return core.scheduler._num_steps

    assert num_steps(LossyAcceptance(rule="threshold", threshold=1e-6)) < 0.6 * num_steps(None)
