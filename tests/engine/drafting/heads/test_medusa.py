"""Medusa heads: their arithmetic, their published names, and which token each of them means."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from engine.drafting.guess import NO_GUESS, Seen, Want
from engine.drafting.heads.medusa import find
from engine.weights.errors import CheckpointError
from tests.engine.drafting.heads.targets import sequence as one_sequence
from tests.engine.drafting.heads.targets import surroundings
from tests.engine.tiny import TINY

HIDDEN, VOCAB = TINY.hidden_size, TINY.vocab_size
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def around():
    return surroundings()


def parts(num_heads=3, num_blocks=2, seed=0, rows=VOCAB):
    """(head, block) -> (W, b) and head -> vocabulary"""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    blocks = {
        (head, block): (numbers(HIDDEN, HIDDEN), numbers(HIDDEN))
        for head in range(num_heads)
        for block in range(num_blocks)
    }
    return blocks, {head: numbers(rows, HIDDEN) for head in range(num_heads)}


def authors(blocks, vocabularies, prefix=""):
    tensors = {}
    for (head, block), (weight, bias) in blocks.items():
        tensors[f"{prefix}{head}.{block}.linear.weight"] = weight
        tensors[f"{prefix}{head}.{block}.linear.bias"] = bias
    last = 1 + max(block for _, block in blocks)
    return tensors | {f"{prefix}{head}.{last}.weight": value for head, value in vocabularies.items()}


def others(blocks, vocabularies, prefix=""):
    tensors = {}
    for (head, block), (weight, bias) in blocks.items():
        tensors[f"{prefix}blocks.{head}.layers.{block}.weight"] = weight
        tensors[f"{prefix}blocks.{head}.layers.{block}.bias"] = bias
    return tensors | {f"{prefix}lm_heads.{head}.weight": value for head, value in vocabularies.items()}


def load(folder, config, around):
    return find(folder, config, around.model.config)(around, 0)


def written(folder, tensors, file="model.safetensors", **config):
    config = {"medusa_num_heads": 3, "medusa_num_layers": 2, "base_model_name_or_path": "a/b"} | config
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)
    return folder, config


def defined(features, blocks, vocabulary, head):
    """One head in plain torch."""
    x = features
    for (owner, _), (weight, bias) in blocks.items():
        if owner == head:
            x = x + F.silu(F.linear(x, weight, bias))
    return F.linear(x, vocabulary)


@pytest.mark.parametrize(
    ("spell", "config"),
    [
        (authors, {}),
        (lambda *given: authors(*given, prefix="medusa_head."), {"hidden_size": HIDDEN, "vocab_size": VOCAB}),
        (
            others,
            {"medusa_num_heads": None, "num_heads": 3, "medusa_num_layers": None, "num_hidden_layers": 2},
        ),
        (lambda *given: others(*given, prefix="medusa_heads."), {"model_type": "medusa", "logit_scale": 1.0}),
    ],
)
def test_both_published_spellings_are_the_same_heads(tmp_path, around, spell, config):
    blocks, vocabularies = parts()
    drafter = load(
        *written(tmp_path, spell(blocks, vocabularies), "medusa_lm_head.safetensors", **config), around
    )
    features = torch.randn(5, HIDDEN)
    assert drafter.weights.num_heads == 3
    for head in range(3):
        expected = defined(features, blocks, vocabularies[head], head)
        torch.testing.assert_close(drafter.logits(features, head), expected, rtol=1e-5, atol=1e-5)


def test_heads_without_a_vocabulary_use_the_target_s(tmp_path, around):
    blocks, _ = parts()
    drafter = load(*written(tmp_path, authors(blocks, {})), around)
    features = torch.randn(2, HIDDEN)
    expected = defined(features, blocks, around.model.head, 1)
    torch.testing.assert_close(drafter.logits(features, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [40, VOCAB])
def test_heads_that_know_a_part_of_the_vocabulary(tmp_path, around, rows):
    blocks, vocabularies = parts(rows=rows)
    known = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:40]
    tensors = others(blocks, vocabularies) | {"token_map": known}
    folder, config = written(tmp_path, tensors, truncated_vocab_size=40, logit_scale=0.5)
    features = torch.randn(3, HIDDEN)
    found = load(folder, config, around).logits(features, 0)
    expected = torch.full((3, VOCAB), float("-inf"))
    vocabulary = vocabularies[0] if rows == 40 else vocabularies[0][known]
    expected[:, known] = defined(features, blocks, vocabulary, 0) * 0.5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_vocabulary_for_all_heads(tmp_path, around):
    blocks, vocabularies = parts()
    tensors = others(blocks, {}) | {"lm_head.weight": vocabularies[0]}
    drafter = load(*written(tmp_path, tensors, original_lm_head=True), around)
    assert all(torch.equal(own, vocabularies[0]) for own in drafter.weights.vocabularies)


@pytest.mark.parametrize(
    ("change", "config", "complaint"),
    [
        ({}, {"hidden_size": 64}, "hidden_size = 64, the model has 48: take heads"),
        ({}, {"vocab_size": 32000}, "vocab_size = 32000, the model has 300"),
        ({}, {"medusa_num_heads": 4}, "tensor '3.0.linear.weight' is missing"),
        ({}, {"medusa_num_heads": None}, "lacks medusa_num_heads"),
        ({}, {"medusa_num_heads": 1000}, "medusa_num_heads = 1000 is not supported; the limit is 64"),
        ({}, {"medusa_num_heads": "three"}, "medusa_num_heads = 'three' is not supported"),
        ({}, {"truncated_vocab_size": 40}, "tensor 'token_map' is missing"),
        (
            {"token_map": torch.zeros(40, dtype=torch.int64)},
            {"truncated_vocab_size": 40},
            "names a token twice",
        ),
        ({"token_map": torch.ones(40)}, {"truncated_vocab_size": 40}, "it needs 40 integers"),
        ({"0.2.weight": torch.ones(299, HIDDEN)}, {}, r"'0.2.weight' has shape \[299, 48\]"),
        ({"0.2.weight": None}, {}, "tensor '0.2.weight' is missing"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, around, change, config, complaint):
    tensors = {name: value for name, value in (authors(*parts()) | change).items() if value is not None}
    folder, config = written(tmp_path, tensors, **config)
    with pytest.raises(CheckpointError, match=complaint) as refusal:
        load(folder, config, around)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_pickled_heads_are_never_opened(tmp_path, around):
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 3}')
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"medusa_lm_head.pt is pickled.*convert it to safetensors"):
        load(tmp_path, {"medusa_num_heads": 3}, around)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory, around):
    return load(*written(tmp_path_factory.mktemp("heads"), authors(*parts())), around)


def seen(sequence, start, tokens, parents, drawn, kept, features):
    return Seen(sequence, start, tuple(tokens), parents, drawn, kept, (features,), None)


@pytest.fixture(autouse=True)
def the_same_features_each_time():
    """How far a line goes depends on them."""
    torch.manual_seed(3)


def best(drafter, feature, count=3):
    return tuple(int(drafter.logits(feature[None], head).argmax()) for head in range(count))


def line_of(guess):
    """The tokens of the best line."""
    line, at = [], -1
    while at in guess.parents:
        at = guess.parents.index(at)
        line.append(guess.tokens[at])
    return tuple(line)


def test_heads_look_at_the_row_after_which_the_last_token_was_drawn(drafter):
    sequence = one_sequence([5, 6, 7], **GREEDY)
    features = torch.randn(6, HIDDEN)
    # a tree behind 7: 8 and 9, then 10 behind 9; 9 and 10 stand, and 11 was drawn behind them
    drafter.observe([seen(sequence, 0, [5, 6, 7, 8, 9, 10], (-1, -1, 1), (9, 1, 10, 11), (1, 2), features)])
    assert drafter.guess([Want(sequence, 4)]) == [NO_GUESS], "its tokens are not committed yet"
    sequence.tokens += [9, 10, 11]
    [guess] = drafter.guess([Want(sequence, 24)])
    assert line_of(guess) == best(drafter, features[5])
    drafter.observe([seen(sequence, 5, [11, 3], (-1,), (12, 4), (), torch.stack((features[1], features[2])))])
    sequence.tokens.append(12)
    [guess] = drafter.guess([Want(sequence, 24)])
    assert line_of(guess) == best(drafter, features[1])
    drafter.release(sequence)
    assert drafter.guess([Want(sequence, 4)]) == [NO_GUESS]
    assert not drafter._states


def test_many_sequences_are_guessed_for_at_once_each_within_its_limit(drafter):
    sequences = [one_sequence([number], number, **GREEDY) for number in range(4)]
    features = torch.randn(4, HIDDEN)
    drafter.observe(
        [
            seen(one, 0, [number], (), (50,), (), features[number : number + 1])
            for number, one in enumerate(sequences[:3])
        ]
    )
    for one in sequences:
        one.tokens.append(50)
    guesses = drafter.guess([Want(one, limit) for one, limit in zip(sequences, (1, 9, 0, 9), strict=True)])
    assert guesses[0].tokens == best(drafter, features[0], 1)
    assert line_of(guesses[1]) == best(drafter, features[1])
    assert len(guesses[1].tokens) <= 9
    assert guesses[2:] == [NO_GUESS, NO_GUESS]
    for one in sequences:
        drafter.release(one)


def test_the_middle_of_a_prompt_tells_nothing(drafter):
    sequence = one_sequence([5, 6, 7], **GREEDY)
    drafter.observe([seen(sequence, 0, [5, 6], (), (), (), torch.randn(2, HIDDEN))])
    assert drafter.guess([Want(sequence, 4)]) == [NO_GUESS]


def test_what_a_request_forbids_is_not_drafted_and_what_is_not_finite_neither(drafter):
    feature = torch.randn(1, HIDDEN)
    free, bound = one_sequence([1], 0, **GREEDY), one_sequence([1], 1, **GREEDY, bad_words=())
    first, second, third = best(drafter, feature[0])
    banned = one_sequence([1], 2, **GREEDY, bad_words=((first, second), (third,)))
    broken = one_sequence([1], 3, **GREEDY)
    for one in (free, bound, banned, broken):
        values = feature if one is not broken else feature * float("nan")
        drafter.observe([seen(one, 0, [1], (), (50,), (), values)])
        one.tokens.append(50)
    guesses = drafter.guess([Want(one, 24) for one in (free, bound, banned, broken)])
    assert line_of(guesses[0]) == (first, second, third)
    assert line_of(guesses[2])[0] == first
    assert line_of(guesses[2])[1] != second
    assert third not in guesses[2].tokens
    assert guesses[3] == NO_GUESS
    for one in (free, bound, banned, broken):
        drafter.release(one)
