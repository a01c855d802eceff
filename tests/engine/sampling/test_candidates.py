"""Candidates are what the sampler would draw, best first: whatever is asked for, whatever the logits are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.drafting.kinds import NUM_CHANCES, NUM_KINDS, belief_of, kind_of
from engine.sampling.candidates import candidates
from engine.sampling.sampler import sample
from tests.engine.sampling.test_sampler import VOCABULARY, place, random_logits

SPIKY = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30)

samplings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-9, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5, 400]),
        "top_p": st.sampled_from([0.1, 0.9, 0.9999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "typical_p": st.sampled_from([0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.7]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "logit_bias": st.just(((3, 5.0), (4, -100.0))),
        "bad_words": st.just(((3,), (1, 7))),
        "allowed_token_ids": st.sampled_from([tuple(range(0, 900, 3)), (2, 6)]),
        "min_tokens": st.just(4),
        "stop_token_ids": st.just((6, 9)),
        "seed": st.integers(0, 2**64 - 1),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(samplings, min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
)
def test_the_first_candidate_is_the_draw_and_the_chances_descend(asked, seed, count, coarse):
    logits = random_logits(len(asked), seed)
    if coarse:
        logits = logits.round()  # ties everywhere, as bfloat16 has them
    places = [
        place(output=[5] * row, drafted=(1, 7)[: row % 3], index=row, **sampling)
        for row, sampling in enumerate(asked)
    ]
    drawn = sample(logits.clone(), places)
    found = candidates(logits, places, count)
    assert found.tokens.shape == found.chances.shape == (len(asked), count)
    for row in range(len(asked)):
        chances, tokens = found.chances[row].tolist(), found.tokens[row].tolist()
        if row in drawn.errors:
            assert not any(chances)
            continue
        assert tokens[0] == drawn.tokens[row]
        assert chances == sorted(chances, reverse=True)
        assert chances[0] > 0.0
        assert sum(chances) < 1.001
        possible = [token for token, chance in zip(tokens, chances, strict=True) if chance > 0.0]
        assert len(set(possible)) == len(possible)


@settings(max_examples=60, deadline=None)
@given(samplings, st.integers(0, 1000), st.lists(st.sampled_from(SPIKY), min_size=1, max_size=6))
def test_numbers_that_are_not_finite_never_raise(sampling, seed, spikes):
    logits = random_logits(2, seed)
    logits[0, : len(spikes)] = torch.tensor(spikes)
    found = candidates(logits, [place(**sampling), place(**sampling)], 4)
    assert bool(((found.chances >= 0.0) & (found.chances <= 1.001)).all())
    assert bool(((found.tokens >= 0) & (found.tokens < VOCABULARY)).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_second_candidate_is_what_is_drawn_without_the_first(temperature):
    logits = random_logits(1)
    [tokens], _ = candidates(logits, [place(temperature=temperature, seed=5)], 4)
    for token in tokens.tolist():
        assert sample(logits, [place(temperature=temperature, seed=5)]).tokens == [token]
        logits[0, token] = float("-inf")


def test_what_cannot_be_drawn_has_no_chance():
    logits = random_logits(3)
    nothing = place(temperature=1.0, allowed_token_ids=(4,), bad_words=((4,),))
    one = place(temperature=0.0, allowed_token_ids=(4,))
    two = place(temperature=1.0, top_k=2)
    found = candidates(logits, [nothing, one, two], 5)
    assert [int((row > 0).sum()) for row in found.chances] == [0, 1, 2]
    assert found.tokens[1, 0] == 4
    assert found.chances[1, 0] == 1.0


def test_a_vocabulary_smaller_than_what_is_asked_for():
    found = candidates(torch.tensor([[0.0, 1.0]]), [place(vocabulary=2, temperature=0.0)], 5)
    assert found.tokens[0, :2].tolist() == [1, 0]
    assert found.chances[0, 2:].tolist() == [0.0] * 3


def test_kinds_tell_chances_and_ranks_apart():
    kinds = {kind_of(chance / 100, rank) for chance in range(101) for rank in range(5)}
    assert kinds == set(range(NUM_KINDS))
    assert kind_of(0.99, 7) == kind_of(0.97, 2) == NUM_KINDS - 1
    assert [kind_of(0.0, rank) for rank in (0, 1, 2, 3)] == [0, NUM_CHANCES, 2 * NUM_CHANCES, 2 * NUM_CHANCES]
    assert [belief_of(chance) for chance in (0.0, 0.5, 1.0)] == [0.02, 0.5, 0.98]
