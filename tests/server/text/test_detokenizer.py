"""Pieces joined are the whole text, for any text, any tokens and any way to cut them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.detokenizer import IncrementalDetokenizer
from tests.server.text.test_tokenizer import sentencepiece_like, word_pieces

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer

relaxed = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.lists(st.integers(1, 5), max_size=40)
token_lists = st.lists(st.integers(-1, 49160), max_size=30)


def pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip_special: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special)
    found, at = [], 0
    for size in [*cuts, max(1, len(ids))]:
        found.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*found, detokenizer.flush()]


# The vocabulary has no token for some bytes (0xF1 and 0xF2 begin planes without characters, some controls
# never occurred in training): those characters are lost in encoding, as with every other implementation.
encodable = st.characters(codec="utf-8", min_codepoint=32, max_codepoint=0x3FFFF) | st.sampled_from(
    "\n\t\r\0"
)


@relaxed
@given(text=st.text(encodable), cuts=sizes)
def test_text_comes_back_whole(smollm2: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = smollm2.encode(text, special=False)
    found = pieces(smollm2, ids, cuts, True)
    assert "".join(found) == text
    assert found[-1] == ""  # nothing was held back that was complete


@relaxed
@given(ids=token_lists, cuts=sizes, skip_special=st.booleans())
def test_any_tokens_give_what_decoding_all_of_them_gives(
    smollm2: Tokenizer, ids: list[int], cuts: list[int], skip_special: bool
) -> None:
    assert "".join(pieces(smollm2, ids, cuts, skip_special)) == smollm2.decode(ids, skip_special)


def test_half_a_character_is_held_back(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("🙂", special=False)
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(smollm2, True)
    assert [detokenizer.push((token,)) for token in ids] == [""] * (len(ids) - 1) + ["🙂"]
    cut_off = IncrementalDetokenizer(smollm2, True)
    assert cut_off.push(ids[:-1]) == ""
    assert cut_off.flush() == "\ufffd"
    assert cut_off.flush() == ""


@pytest.mark.parametrize("skip_special", [True, False])
def test_special_tokens_are_shown_on_request(smollm2: Tokenizer, skip_special: bool) -> None:
    detokenizer = IncrementalDetokenizer(smollm2, skip_special)
    assert detokenizer.push((81, 2, 81)) == ("aa" if skip_special else "a<|im_end|>a")


@relaxed
@given(text=st.text("hi é🙂", max_size=20), cuts=sizes)
def test_sentencepiece_comes_back_with_the_space_before_it(text: str, cuts: list[int]) -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids) == text
    assert "".join(pieces(tokenizer, ids, cuts, True)) == tokenizer.decode(ids, begins=False)


@relaxed
@given(ids=st.lists(st.integers(0, 5), max_size=20), cuts=sizes)
def test_other_vocabularies_go_through_their_own_decoder(ids: list[int], cuts: list[int]) -> None:
    tokenizer = word_pieces()
    assert "".join(pieces(tokenizer, ids, cuts, True)) == tokenizer.decode(ids)


def test_tokens_without_text_are_not_decoded_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_pieces()
    decoded = []
    whole = type(tokenizer).decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, skip: decoded.append(len(ids)) or whole(tokenizer, ids, skip)
    )
    detokenizer = IncrementalDetokenizer(tokenizer, True)
    assert detokenizer.push([1] + [9] * 300 + [1]) == whole(tokenizer, [1, 1])
    assert max(decoded) < 40
