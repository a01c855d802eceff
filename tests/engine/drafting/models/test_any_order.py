"""Draft models in any order of growth, loss, drafts that stood and ends: every pass says what a plain forward
pass over the same tokens says, whatever is asked never raises, and in the end nothing is held."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

from cuda_kernels.ops import pick
from engine.drafting.draft_kv import TREE_SLOTS, DraftKV
from engine.drafting.guess import CATCHING_UP, NO_GUESS, DraftsAhead, Want
from engine.drafting.models import following
from engine.drafting.models.draft_model import DraftModel
from engine.drafting.models.following import Following
from engine.drafting.models.pard import Pard
from engine.drafting.models.small_model import SmallModel
from engine.drafting.vocabularies.other_vocabulary import OtherVocabulary
from engine.models.config import Layer, Rope
from tests.engine.drafting.models.small import (
    VOCAB,
    paths,
    plain_logits,
    processor_of,
    sequence,
    transformer,
)  # fmt: skip
from tests.engine.drafting.vocabularies.vocabularies import spellers
from tests.engine.tiny import CPU, TINY

ROPE = Rope(theta=10000.0, num_rotated=16)
WHOLE = replace(TINY, vocab_size=290, layers=(Layer(rope=ROPE),))
SLIDING = replace(TINY, layers=(Layer(rope=ROPE), Layer(rope=ROPE, window=21)))
MASK = 7
MAX_LEN = 150
SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.7, "allowed_token_ids": (3,), "logit_bias": ((3, -90.0),)},
)


def parts(config, num_pages):
    """Pages for two or three sequences, tables for four."""
    model = transformer(config, seed=6)
    kv = DraftKV(config, pick(CPU), num_pages, 16, MAX_LEN + TREE_SLOTS, 4, torch.float32, CPU)
    return DraftModel(model, kv, VOCAB, processor_of)


def small(config, num_pages):
    draft = parts(config, num_pages)
    return SmallModel(draft, Following(draft.kv, MAX_LEN, config.vocab_size), cost=0.02)


def pard(config, num_pages):
    draft = parts(config, num_pages)
    return Pard(draft, Following(draft.kv, MAX_LEN, config.vocab_size), MASK)


def other(config, num_pages):
    target, own = spellers()["bytes"], spellers()["fine"]
    return OtherVocabulary(
        parts(replace(config, vocab_size=own.size), num_pages), MAX_LEN, (target, own), 0.02
    )


def spied(drafter, monkeypatch):
    """-> what was computed since the last look: (the text up to there, its logits) of each row."""
    seen: list[tuple[list[int], torch.Tensor]] = []
    text, named = drafter.following.text, drafter.following.named
    known = drafter.following.num_known - 1

    def note(rows, texts):
        assert len(rows) == len(texts)
        seen.extend(
            ([min(token, known) for token in text], row) for text, row in zip(texts, rows, strict=True)
        )

    successors = drafter.draft.successors

    def of_tree(logits, after):
        note(logits, [[*text(one), *map(named, path)] for one, path in after])
        return successors(logits, after)

    if isinstance(drafter, Pard):
        levels = drafter._levels

        def of_masks(ready, logits):
            behind = [range(1 + len(drafter._masks(stretch))) for stretch in ready]
            whose = zip(ready, behind, strict=True)
            note(logits, [[*text(one.want.sequence), *[MASK] * n] for one, counts in whose for n in counts])
            return levels(ready, logits)

        monkeypatch.setattr(drafter, "_levels", of_masks)
    else:
        monkeypatch.setattr(drafter.draft, "successors", of_tree)
    if isinstance(drafter, OtherVocabulary):
        speak = drafter._speak

        def of_speech(speeches, logits):
            note(logits, [[*text(one.stretch.want.sequence), *one.tokens] for one in speeches])
            speak(speeches, logits)

        monkeypatch.setattr(drafter, "_speak", of_speech)
    return seen


def grow(drafter, one, guess, rng):
    """Some of what was guessed, or drafted ahead, stands, or something else comes, or nothing yet."""
    found = paths(guess)
    tree = drafter.following.grown(one) if isinstance(drafter, SmallModel) else None
    if tree is not None and tree.nodes and rng.random() < 0.5:
        one.tokens += tree.path(rng.randrange(len(tree.nodes)))
        return
    if found and rng.random() < 0.7:
        one.tokens += rng.choice(found)
    one.tokens += [rng.randrange(250) for _ in range(rng.choice((0, 1, 1, 1, 2, 30)))]


@torch.inference_mode()
def go_ahead(drafter, wants, rng):
    """Some of them are drafted for further, as if the target were verifying their drafts."""
    if isinstance(drafter, DraftsAhead) and rng.random() < 0.6:
        some = rng.sample(wants, rng.randrange(len(wants) + 1))
        for _ in islice(drafter.ahead([want.sequence for want in some]), rng.randrange(6)):
            pass


def begun(rng, seq_id):
    length = rng.choice((1, 15, 16, 17, 60, 127, 128, 129, MAX_LEN - 1, MAX_LEN, MAX_LEN + 1))
    return sequence([rng.randrange(250) for _ in range(length)], seq_id, **rng.choice(SAMPLINGS))


def driven(drafter, rng, num_steps, seen):
    """Yields after each call."""
    living = {seq_id: begun(rng, seq_id) for seq_id in range(6)}
    for number in range(num_steps):
        asked = rng.sample(sorted(living), rng.randrange(0, len(living) + 1))
        wants = [Want(living[seq_id], rng.choice((0, 1, 1, 2, 7, 64, 100))) for seq_id in asked]
        seen.clear()
        guesses = drafter.guess(wants)
        assert len(guesses) == len(wants)
        go_ahead(drafter, wants, rng)
        yield
        for want, guess in zip(wants, guesses, strict=True):
            assert len(guess.tokens) <= want.limit
            grow(drafter, want.sequence, guess, rng)
        for seq_id in rng.sample(sorted(living), rng.randrange(3)):
            if rng.random() < 0.3 or len(living[seq_id].tokens) > MAX_LEN + 20:
                drafter.release(living.pop(seq_id))
                living[6 + number] = begun(rng, 6 + number)
    for one in living.values():
        drafter.release(one)
    kv = drafter.draft.kv
    assert (kv.num_free_blocks, kv.batches.num_tables, len(kv._held)) == (kv.num_blocks, 0, 0)
    assert not drafter.following._trees


@pytest.mark.parametrize("make", [small, pard, other])
@pytest.mark.parametrize(("config", "num_pages"), [(WHOLE, 31), (SLIDING, 70)], ids=["whole", "sliding"])
def test_every_row_is_that_of_a_plain_pass(make, config, num_pages, monkeypatch):
    monkeypatch.setattr(following, "CATCH_UP_TOKENS", 200)
    rng = random.Random(num_pages)
    drafter = make(config, num_pages)
    seen = spied(drafter, monkeypatch)
    compared = 0
    for _ in driven(drafter, rng, 40, seen):
        for text, row in rng.sample(seen, min(6, len(seen))):
            plain = plain_logits(drafter.draft.model, text)[0]
            torch.testing.assert_close(row[: len(plain)], plain, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("make", [small, pard, other])
@pytest.mark.parametrize("whose", ["embedding", "layers", "final_norm"])
def test_broken_weights_never_raise_and_are_no_guess(make, whose, monkeypatch):
    """All numbers are wrong, or those behind some tokens."""
    monkeypatch.setattr(following, "CATCH_UP_TOKENS", 200)
    drafter = make(WHOLE, 31)
    model = drafter.draft.model
    if whose == "embedding":
        model.embedding[::3] = float("nan")
        model.embedding[1::9] = float("inf")
    elif whose == "layers":
        model.layers[0].qkv.fill_(3e38)
    else:
        model.final_norm.fill_(float("nan"))
    seen = spied(drafter, monkeypatch)
    for _ in driven(drafter, random.Random(1), 30, seen):
        pass
    assert drafter.draft.kv.storage.tainted


def test_who_waits_for_its_turn_to_be_read_is_told_apart_from_who_has_no_room(monkeypatch):
    monkeypatch.setattr(following, "CATCH_UP_TOKENS", 50)
    for make in (small, pard, other):
        drafter = make(WHOLE, 23)  # for two sequences of 70 tokens and what is drafted behind them
        wants = [Want(sequence([9] * 70, seq_id), 4) for seq_id in range(3)]
        found = [drafter.guess(wants) for _ in range(4)]
        assert [guess is CATCHING_UP for guess in found[0]] == [True, True, False]
        assert all(guess.tokens for guess in found[-1][:2])
        assert found[-1][2] is NO_GUESS
