"""Texts as two vocabularies spell them: whatever was committed, however it came, whatever is said."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.drafting.vocabularies.alignment import LONGEST_SEGMENT, Alignment
from engine.drafting.vocabularies.speller import Speller
from engine.vocabulary import document
from engine.weights.errors import CheckpointError
from tests.engine.drafting.vocabularies.vocabularies import TEXTS, spellers

NAMES = ("coarse", "fine", "bytes", "bpe", "bpe_no_prefix", "unigram")
PAIRS = [pair for pair in itertools.product(NAMES, NAMES) if pair[0] != pair[1]]
AWKWARD = [
    *TEXTS,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f642\U0001f642 \u4f60\u597d\u4f60\u597d",
    "  two  spaces\n\n\n\ttabs \u00a0 and   ends  ",
    "e\u0301 o\u0308 \uff28\uff45 \u017f \u212a \ufb01",
    "<|user|>hello<|end|><s></s> <0x41>",
    "a" * 300,
    " ".join(["word"] * 200),
]
relaxed = settings(max_examples=60, deadline=None)
pairs = st.sampled_from(PAIRS)


def alignment(pair: tuple[str, str]) -> Alignment:
    return Alignment(*(spellers()[name] for name in pair))


def scratch(pair: tuple[str, str], committed: list[int]) -> list[int]:
    found = alignment(pair)
    found.follow(committed)
    return found.tokens


def joined(speller: Speller, tokens: list[int]) -> bytes:
    return b"".join(map(speller.bytes_of, tokens))


@given(pairs, st.lists(st.integers(0, 10**6), max_size=400), st.integers(0, 99))
@relaxed
def test_it_does_not_matter_in_which_steps_a_text_came(pair, numbers, seed):
    """Of any tokens, special ones and pieces of characters among them."""
    committed = [number % spellers()[pair[0]].size for number in numbers]
    rng, grown, at = random.Random(seed), alignment(pair), 0
    while at < len(committed):
        fixed = grown.tokens[: grown.num_fixed]
        at += rng.choice((1, 1, 2, 5, 40))
        grown.follow(committed[:at])
        assert grown.tokens[: len(fixed)] == fixed
    assert grown.tokens == scratch(pair, committed)


@given(pairs, st.text(max_size=200) | st.sampled_from(AWKWARD))
@relaxed
def test_no_more_than_the_last_segment_is_encoded_anew(pair, text):
    committed = spellers()[pair[0]].encode(text.encode("utf-8", "replace"), begins=True)
    grown = alignment(pair)
    grown.follow(committed)
    assert len(committed) - grown.open_from <= LONGEST_SEGMENT


@pytest.mark.parametrize("draft", ["coarse", "fine", "bytes"])
@pytest.mark.parametrize("target", NAMES)
@given(numbers=st.lists(st.integers(0, 10**6), max_size=200))
@relaxed
def test_where_every_byte_is_a_token_nothing_of_a_text_is_lost(target, draft, numbers):
    mine, theirs = spellers()[draft], spellers()[target]
    committed = [number % theirs.size for number in numbers]
    text = joined(theirs, committed[committed[:1] == [theirs.bos] :])
    found = joined(mine, scratch((target, draft), committed))
    assert found == text or (theirs.strips_space and b" " + found == text)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] != "bytes"], ids="-".join)
def test_the_words_of_a_text_are_spelled_as_the_draft_model_learned_them(pair):
    target, draft = (spellers()[name] for name in pair)
    for text in (*TEXTS, " ".join(TEXTS)):
        begin = [draft.bos] if draft.bos is not None else []
        committed = target.encode(text.encode(), begins=True)
        assert scratch(pair, committed) == begin + draft.encode(text.encode(), begins=True)


@given(
    pairs,
    st.lists(st.integers(0, 10**6), max_size=80) | st.sampled_from(AWKWARD),
    st.lists(st.integers(0, 10**6), max_size=20) | st.sampled_from(AWKWARD),
)
@relaxed
def test_drafts_spell_what_was_said_behind_any_text(pair, before, said):
    target, draft = (spellers()[name] for name in pair)

    def tokens(speller: Speller, given: list[int] | str) -> list[int]:
        if isinstance(given, str):
            return speller.encode(given.encode(), begins=True)
        return [number % speller.size for number in given]

    committed = tokens(target, before)
    raw = b"".join(draft.bytes_of(token) for token in tokens(draft, said))
    grown = alignment(pair)
    grown.follow(committed)
    found = grown.spelled(committed, raw)
    assert raw.startswith(joined(target, found))
    assert not any(target.special_text(token) for token in found)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_what_the_target_would_have_said_itself_is_what_it_is_offered(pair):
    """From any place in a text, the draft model says the rest of it."""
    target = spellers()[pair[0]]
    for text in (*TEXTS, AWKWARD[8]):
        whole, grown = target.encode(text.encode(), begins=True), alignment(pair)
        for at in range(1, len(whole), 7):
            grown.follow(whole[:at])
            assert grown.spelled(whole[:at], joined(target, whole[at:])) == whole[at:]


def test_special_tokens_of_both_are_themselves_and_others_are_their_text():
    target, draft = spellers()["coarse"], spellers()["fine"]
    user, end = target.special["<|user|>"], target.special["<|end|>"]
    committed = [user, *target.encode(b"the cat", begins=False), end, user]
    found = scratch(("coarse", "fine"), committed)
    mine = draft.special["<|user|>"]
    assert found[0] == found[-1] == mine
    assert joined(draft, found[1:-1]) == b"the cat<|end|>"
    assert draft.special["<|stop|>"] not in found


def test_each_begins_a_text_as_it_was_trained_to():
    target, draft = spellers()["bpe"], spellers()["unigram"]
    text = target.encode(b"the cat", begins=True)
    grown = Alignment(target, draft)
    grown.follow([target.bos, *text])
    assert grown.tokens == [draft.bos, *draft.encode(b"the cat", begins=True)]


def test_half_a_character_is_spelled_in_bytes_until_it_is_whole():
    target, draft = spellers()["bytes"], spellers()["coarse"]
    smile = "\U0001f642".encode()
    committed = target.encode(b"it is " + smile, begins=True)
    grown = Alignment(target, draft)
    for left in (3, 2, 1):
        grown.follow(committed[:-left])
        assert joined(draft, grown.tokens) == b"it is " + smile[:-left]
        assert (
            joined(target, grown.spelled(committed[:-left], smile[-left:] + b" the"))
            == smile[-left:] + b" the"
        )
    grown.follow(committed)
    assert grown.tokens == draft.encode(b"it is " + smile, begins=True)


def test_a_vocabulary_whose_tokens_have_no_bytes_is_refused():
    backend = {
        "model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1, "##b": 2}, "unk_token": "[UNK]"}
        | {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    }
    with pytest.raises(CheckpointError, match="neighbours"):
        Speller(document.build(backend))
