"""PARD: the published layout, one pass, and drafts as the target would draw them."""

from __future__ import annotations

import pytest
import torch

from engine.drafting.guess import Want
from engine.drafting.models import following
from engine.drafting.models.pard import MAX_MASKS
from engine.sampling.places import Place
from engine.sampling.sampler import sample
from tests.engine.drafting.models.small import (
    VOCAB,
    pard,
    paths,
    plain_logits,
    processor_of,
    sequence,
    transformer,
)  # fmt: skip

MASK = 290
TEXTS = ([7, 8, 9], list(range(30, 60)), [11, 12, 13, 14, 15, 16, 17, 18] * 5)  # who lacks least is first


@pytest.fixture(scope="module")
def model():
    return transformer(seed=3)


def spied(drafter, monkeypatch) -> list[torch.Tensor]:
    """The logits of every pass."""
    passes: list[torch.Tensor] = []
    logits = drafter.draft.logits
    monkeypatch.setattr(drafter.draft, "logits", lambda pieces: passes.append(logits(pieces)) or passes[-1])
    return passes


def test_one_pass_says_what_the_model_says_behind_its_masks(model, monkeypatch):
    drafter = pard(model, MASK)
    passes = spied(drafter, monkeypatch)
    limits = (4, 6, 30)
    wants = [
        Want(sequence(list(text), seq_id), limit)
        for seq_id, (text, limit) in enumerate(zip(TEXTS, limits, strict=True))
    ]
    for _ in range(3):
        passes.clear()
        drafter.guess(wants)
        assert len(passes) == 1
        counts = [min(want.limit, 1 + MAX_MASKS) for want in wants]
        for want, count, rows in zip(wants, counts, torch.split(passes[0], counts), strict=True):
            text = [*want.sequence.tokens, *[MASK] * (count - 1)]
            torch.testing.assert_close(rows, plain_logits(model, text, count), rtol=1e-4, atol=1e-4)
        for want in wants:
            want.sequence.tokens += [5, 6]


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.5, "presence_penalty": 0.6, "top_k": 20}],
)
def test_its_best_line_is_drawn_with_the_noise_of_each_place(model, sampling):
    one = sequence([11, 12, 13, 14] * 4, num_output=4, **sampling)
    (guess,) = pard(model, MASK).guess([Want(one, 40)])
    logits = plain_logits(model, [*one.tokens, *[MASK] * MAX_MASKS], 1 + MAX_MASKS)
    line: tuple[int, ...] = ()
    for row in logits:
        line = (*line, sample(row[None], [Place(one, line, processor_of(one))]).tokens[0])
    found = set(paths(guess))
    assert line[:1] in found
    assert max(len(path) for path in found if path == line[: len(path)]) >= 2


def test_limits_are_kept_and_nothing_stays_behind(model):
    drafter = pard(model, MASK)
    one = sequence(TEXTS[2], temperature=0.9)
    for limit in (1, 2, 5, 64):
        (guess,) = drafter.guess([Want(one, limit)])
        assert 0 < len(paths(guess)) <= limit
        assert all(token < VOCAB for token in guess.tokens)
        assert drafter.draft.kv.length(one.seq_id) == len(one.tokens), "the masks' KV is forgotten"
    drafter.release(one)
    assert drafter.draft.kv.num_free_blocks == 64


def test_a_long_prompt_has_no_masks_in_the_middle(model, monkeypatch):
    monkeypatch.setattr(following, "CATCH_UP_TOKENS", 24)
    drafter = pard(model, MASK)
    passes = spied(drafter, monkeypatch)
    one = sequence(TEXTS[2])
    guesses = [drafter.guess([Want(one, 4)])[0] for _ in range(2)]
    assert not guesses[0].tokens
    assert guesses[1].tokens
    torch.testing.assert_close(
        passes[1], plain_logits(model, [*one.tokens, MASK, MASK, MASK], 4), rtol=1e-4, atol=1e-4
    )
