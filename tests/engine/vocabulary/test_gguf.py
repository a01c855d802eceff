"""GGUF vocabularies: types of tokens, what files leave out, and what is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import CheckpointError
from engine.vocabulary import byte_level
from engine.vocabulary.gguf import from_gguf
from server.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ALPHABET = [*byte_level._BYTE_OF]


def prefixed(values: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in values.items() if key.startswith("general.")}
    return own | {f"tokenizer.ggml.{key}": value for key, value in values.items() if key not in own}


def bpe(added: dict[str, int] | None = None, **change: Any) -> dict[str, Any]:
    """Byte-level BPE with two merges, and `added` tokens with their types."""
    tokens = [*ALPHABET, "ab", "abc", *(added or {})]
    types = [NORMAL] * 258 + [*(added or {}).values()]
    usual = {"model": "gpt2", "pre": "gpt-2", "tokens": tuple(tokens), "token_type": tuple(types)}
    return prefixed({**usual, "merges": ("a b", "ab c"), **change})


def pieces(added: dict[str, int] | None = None, **change: Any) -> dict[str, Any]:
    """SentencePiece with a few pieces, all bytes, and `added` tokens with their types."""
    table = {
        "<unk>": UNKNOWN,
        "<s>": CONTROL,
        "</s>": CONTROL,
        **{f"<0x{byte:02X}>": BYTE for byte in range(256)},
    }
    table |= dict.fromkeys(["\u2581", "a", "b", "<", "s", ">", "s>", "\u2581a", "ab"], NORMAL) | (added or {})
    scores = tuple(-float(index) for index in range(len(table)))
    usual = {"model": "llama", "tokens": tuple(table), "token_type": tuple(table.values()), "scores": scores}
    return prefixed({**usual, **change})


def read(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(from_gguf(metadata))


def test_only_special_tokens_are_text_where_they_are_not_meant() -> None:
    tokenizer = read(bpe({"<a>": CONTROL, "<b>": USER_DEFINED, "<c>": UNUSED, "<d>": UNKNOWN, "<e>": NORMAL}))
    assert tokenizer.special_texts.texts == ("<a>", "<d>")
    assert tokenizer.encode("<a><b><c>", special=True)[:2] == [258, 259]
    plain = tokenizer.encode("<a><b><c><d><e>", special=False)
    assert [token for token in plain if token >= 258] == [259]


@pytest.mark.parametrize("text", ["<|im_start|>", "<end_of_turn>", "<｜User｜>", "<|tool|>"])
def test_old_files_call_special_tokens_user_defined(text: str) -> None:
    tokenizer = read(bpe({text: USER_DEFINED, "<think>": USER_DEFINED}))
    assert tokenizer.special_texts.texts == (text,)
    assert tokenizer.encode(text, special=True) == [258]


def test_the_ends_and_the_beginning_are_special_whatever_their_type() -> None:
    tokenizer = read(bpe({"<END>": NORMAL, "<BEGIN>": USER_DEFINED}, eos_token_id=258, bos_token_id=259))
    assert set(tokenizer.special_texts.texts) == {"<END>", "<BEGIN>"}
    assert (
        read(bpe(eos_token_id=256, bos_token_id=0)).special_texts.texts == ()
    )  # words, of a file that is wrong


def test_merges_to_a_special_token_are_left_out() -> None:
    tokenizer = read(bpe(token_type=(NORMAL,) * 257 + (CONTROL,)))
    assert tokenizer.encode("abc", special=True) == [257]
    assert 257 not in tokenizer.encode("abc xabcx", special=False)


def test_a_word_that_is_a_special_token_stays_text_where_merges_are_ignored() -> None:
    tokenizer = read(bpe({"bac": CONTROL, "bca": NORMAL}, pre="llama-bpe"))
    assert tokenizer.encode("bca", special=False) == [259]
    assert tokenizer.encode("bac", special=True) == [258]
    assert 258 not in tokenizer.encode("bac x bac", special=False)


@pytest.mark.parametrize(
    ("metadata", "add_bos"),
    [
        (bpe(), False),
        (bpe(pre="llama-bpe"), True),
        (bpe(pre="tekken"), True),
        (bpe(pre="qwen2"), False),
        (pieces(), True),
        (pieces(model="t5"), False),
    ],
)
def test_a_bos_is_added_where_the_file_does_not_say(metadata: dict[str, Any], add_bos: bool) -> None:
    assert read(metadata).add_bos is add_bos


def test_a_missing_pre_is_guessed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    metadata = bpe()
    del metadata["tokenizer.ggml.pre"]
    assert read(metadata).encode("abc", special=False) == [257]
    assert "tokenizer.ggml.pre is missing" in caplog.text


def test_empty_tokens_have_names() -> None:
    metadata = bpe({"": UNUSED, "<x>": CONTROL})
    assert read(metadata).token_bytes(258) == b"[EMPTY_258]"
    assert read(metadata).encode("<x>", special=True) == [259]


def test_tokens_of_phi_3_swallow_the_space_behind_them() -> None:
    added = {"<|end|>": CONTROL, "<|endoftext|>": CONTROL}
    phi, other = read(bpe(added, **{"general.name": "Phi-3 mini"})), read(bpe(added))
    assert phi.encode("<|end|> \na", special=True) == other.encode("<|end|>a", special=True)
    assert phi.encode("<|endoftext|> a", special=True) == other.encode("<|endoftext|> a", special=True)


def test_sentencepiece_tokens_and_bytes_are_not_made_of_text() -> None:
    tokenizer = read(pieces())
    names = [tokenizer._marked.id_to_token(token) for token in tokenizer.encode("a<s>", special=False)]
    assert names == ["\u2581a", "<", "s>"]
    assert tokenizer.encode("<s>ab</s>", special=True)[0] == 1
    assert tokenizer.decode(tokenizer.encode("<0x41>", special=False)) == "<0x41>"


def test_symbols_of_the_owner_are_found_as_they_are_written() -> None:
    """Files with Gemma's vocabulary write its runs of spaces as spaces."""
    tokenizer = read(pieces({"  ": USER_DEFINED, "    ": USER_DEFINED}, add_space_prefix=False))
    two, four = (tokenizer._marked.token_to_id(" " * count) for count in (2, 4))
    assert tokenizer.encode("      a", special=False)[:2] == [four, two]
    assert tokenizer.decode(tokenizer.encode("      a", special=False)) == "      a"


def test_spaces_are_merged_where_the_file_says_so() -> None:
    tokenizer = read(pieces(remove_extra_whitespaces=True))
    assert tokenizer.encode("  a   b ", special=False) == tokenizer.encode("a b", special=False)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (bpe(model="bert"), "'bert'"),
        (bpe(model="rwkv"), "'rwkv'"),
        (bpe(model="plamo2"), "'plamo2'"),
        (bpe(model="hybriddna"), "'hybriddna'"),
        (prefixed({}), "tokenizer.ggml.model is missing"),
        (bpe(pre="whitespace"), "'whitespace'"),
        (bpe(tokens=("a", "b", "a")), "'a' 2 times"),
        (bpe(tokens=(1, 2)), "tokenizer.ggml.tokens"),
        (bpe(token_type=(1,)), "tokenizer.ggml.token_type"),
        (bpe(merges=("a zzz",)), "`zzz` out of vocabulary"),
        (bpe(merges=("a",)), "'a' is not two tokens"),
        (pieces(scores=(1.0,)), "tokenizer.ggml.scores"),
        (pieces(scores=("a",) * 268), "is not a number"),
        (pieces(scores=(float("nan"),) * 268), "is not a number"),
        (pieces(unknown_token_id=10**6), "1000000 is beyond the vocabulary of 268"),
        (pieces(add_space_prefix=3), "tokenizer.ggml.add_space_prefix = 3"),
        (pieces(treat_whitespace_as_suffix=True), "tokenizer.ggml.treat_whitespace_as_suffix"),
        (pieces(precompiled_charsmap=(1000,)), "tokenizer.ggml.precompiled_charsmap"),
        (pieces(precompiled_charsmap=(1, 2, 3)), "vocabulary"),
        (pieces(precompiled_charsmap=(255,) * 64), "vocabulary"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_gguf(metadata)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


texts = st.text(max_size=4) | st.sampled_from(["a", "b", "ab", " ", "\u2581", "<s>", "<0x41>"])
values = (
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.lists(texts, max_size=4).map(tuple)
)
values |= st.lists(st.integers(-5, 300), max_size=6).map(tuple) | st.lists(st.floats(), max_size=4).map(tuple)
KEYS = ["model", "pre", "tokens", "token_type", "merges", "scores", "eos_token_id", "unknown_token_id"]
KEYS += ["add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap"]
changes = st.dictionaries(st.sampled_from(KEYS), values, max_size=3)


@settings(max_examples=300, deadline=None)
@given(change=changes, kind=st.sampled_from([bpe, pieces]))
def test_hostile_metadata_is_read_or_refused(change: dict[str, Any], kind: Any) -> None:
    with contextlib.suppress(CheckpointError):
        read(kind(**change)).encode("a b\u0301<s>", special=False)
