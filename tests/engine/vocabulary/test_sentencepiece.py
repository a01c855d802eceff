"""SentencePiece: equality with the library's own ids, and with its algorithm said in the plainest way."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoint import CheckpointError
from engine.vocabulary import folder, scored_merges, sentencepiece, sentencepiece_file
from engine.vocabulary.sentencepiece import Piece, PieceType, Rules
from server.detokenizer import IncrementalDetokenizer
from server.tokenizer import Tokenizer
from tests.server.text.awkward import cuts

VECTORS = Path(__file__).parent / "vectors"
KINDS = ["bpe", "bpe_no_prefix", "unigram", "unigram_merging_spaces"]
NO_ROWS_LACK = 10**6
relaxed = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def trained(kind: str) -> Tokenizer:
    return Tokenizer(folder._from_pieces(VECTORS / f"{kind}.model", [], {}, NO_ROWS_LACK))


def cases(kind: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((VECTORS / f"{kind}.json").read_text())
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_sentencepiece(kind: str) -> None:
    tokenizer = trained(kind)
    assert len(cases(kind)) > 200
    for case in cases(kind):
        assert tokenizer.encode(case["text"], special=False) == case["ids"], case["text"]


@pytest.mark.parametrize("kind", KINDS[:3])
def test_texts_come_back_however_they_are_cut(kind: str) -> None:
    tokenizer = trained(kind)
    for case in cases(kind):
        text, ids = case["text"], case["ids"]
        if "\u2581" in text:
            continue  # which SentencePiece cannot tell from a space
        assert tokenizer.decode(ids) == text
        for sizes in cuts(len(ids)):
            detokenizer, found, at = IncrementalDetokenizer(tokenizer, True), "", 0
            for size in sizes:
                found += detokenizer.push(ids[at : at + size])
                at += size
            assert found + detokenizer.flush() == tokenizer.decode(ids, begins=False)


def test_within_a_text_no_space_is_put_before_a_word() -> None:
    tokenizer = trained("bpe")
    beginning, within = tokenizer.encode("the", special=False), tokenizer.encode_within("the")
    assert tokenizer.encode_within(" the") == beginning != within
    assert b"".join(map(tokenizer.token_bytes, within)) == b"the"
    assert trained("bpe_no_prefix").encode_within("the") == trained("bpe_no_prefix").encode(
        "the", special=False
    )


def test_a_space_is_put_before_what_follows_a_special_token() -> None:
    old = trained("bpe")
    new = Tokenizer(folder._from_pieces(VECTORS / "bpe.model", [], {"legacy": False}, NO_ROWS_LACK))
    start, word, bare = 1, old.encode("the", special=False), new.encode_masked("<s>the", {})[1:]
    assert old.encode("<s>the<s>the", special=True) == [start, *word, start, *word]
    assert new.encode("the<s>the", special=True) == [*word, start, *bare]
    assert bare != word
    assert old.encode("<s>", special=False) != [start]


def vocabulary(pieces: dict[str, float], **rules: Any) -> Tokenizer:
    own = [Piece(text, score, PieceType.NORMAL) for text, score in pieces.items()]
    fallback = [Piece(f"<0x{byte:02X}>", 0.0, PieceType.BYTE) for byte in range(256)]
    usual = {"unigram": False, "prefix": False, "merge_spaces": False, "unknown_id": None}
    return Tokenizer(sentencepiece.build([*own, *fallback], Rules(**{**usual, **rules}), []))


def slowly_merged(text: str, scores: dict[str, float]) -> list[str]:
    """Look at all neighbours, merge the best of them, the leftmost of equals; again until none are left."""
    pieces = list(text)
    while True:
        joined = [left + right for left, right in itertools.pairwise(pieces)]
        pairs = [(-scores[text], at) for at, text in enumerate(joined) if text in scores]
        if not pairs:
            return pieces
        at = min(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


characters = st.sampled_from("ab\u2581")
some_pieces = st.lists(st.text(characters, min_size=2, max_size=6), min_size=1, max_size=25, unique=True)


@relaxed
@given(pieces=some_pieces, levels=st.integers(1, 30), text=st.text(characters, max_size=40))
def test_merges_are_those_of_the_plain_algorithm(pieces: list[str], levels: int, text: str) -> None:
    """Few levels: many pieces share a score. Many: none do, and ranks of pairs are enough."""
    scores = {piece: -float(index % levels) for index, piece in enumerate(pieces)}
    scores |= {"a": -100.0, "b": -101.0, "\u2581": -102.0}
    tokenizer = vocabulary(scores)
    names = [*scores]
    found = [names[token] for token in tokenizer.encode(text.replace("\u2581", " "), special=False)]
    assert found == slowly_merged(text, scores)


@relaxed
@given(pieces=some_pieces, text=st.text(characters, max_size=40))
def test_quick_and_slow_merges_agree(pieces: list[str], text: str) -> None:
    scores = {piece: float(len(piece) % 3) for piece in pieces}
    assert scored_merges.merged(text, scored_merges.by_score(scores)) == slowly_merged(text, scores)


def test_pieces_of_characters_that_are_none_are_merged() -> None:
    """As SentencePiece does it: what is merged need not be pieces."""
    scores = {"ab": -1.0, "abb": -2.0, "b": -3.0}
    assert not scored_merges.ranks_suffice(scores, sentencepiece._merges(scores))
    assert vocabulary(scores).encode("abbab", special=False) == [1, 0]


def test_runs_of_spaces_that_share_a_score_need_no_slow_merges() -> None:
    lengths = (1, 2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15)  # as Llama 2 orders them
    scores = {"\u2581" * length: -1e9 for length in lengths} | {"a": -1.0, "\u2581a": -0.5}
    assert scored_merges.ranks_suffice(scores, sentencepiece._merges(scores))
    ascending = dict(sorted(scores.items(), key=lambda item: len(item[0])))
    assert not scored_merges.ranks_suffice(ascending, sentencepiece._merges(ascending))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", ["a", "ab ", "\u4e2d", " "])
def test_time_is_near_linear(part: str, tied: bool) -> None:
    scores = {
        "ab": -1.0,
        "\u2581\u2581": -1.0 if tied else -2.0,
        "aa": -3.0,
        "a": -9.0,
        "b": -9.5,
        "\u2581": -9.6,
    }
    tokenizer = vocabulary(scores)
    text = part * (60_000 // len(part))
    start = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    assert time.perf_counter() - start < 5.0


def test_long_pieces_cost_no_more_than_their_bounds() -> None:
    with pytest.raises(CheckpointError, match="has 100000 characters; at most 1024"):
        vocabulary({"ab" * 50_000: 0.0})
    tied = {"a" * length: -1.0 for length in range(1, 600)}
    started_s = time.perf_counter()
    tokenizer = vocabulary(tied)
    assert time.perf_counter() - started_s < 1.5  # takes 0.3 s; trying every run of them took 3 s
    found = [tokenizer.decode([token]) for token in tokenizer.encode("a" * 99, special=False)]
    assert found == slowly_merged("a" * 99, tied)


def test_what_is_no_piece_becomes_bytes_or_unknown() -> None:
    tokenizer = vocabulary({"a": -1.0, "\u2581": -2.0})
    assert tokenizer.encode("a é", special=False) == [0, 1, 2 + 0xC3, 2 + 0xA9]
    assert 2 + 0x41 not in tokenizer.encode("<0x41>", special=False)
    pieces = [Piece("<unk>", 0.0, PieceType.UNKNOWN), Piece("a", -1.0, PieceType.NORMAL)]
    rules = Rules(unigram=False, prefix=False, merge_spaces=False, unknown_id=0)
    assert Tokenizer(sentencepiece.build(pieces, rules, [])).encode("éza", special=False) == [0, 1]


@relaxed
@given(data=st.binary(max_size=80))
def test_a_hostile_model_file_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        sentencepiece_file.read(data)


@relaxed
@given(at=st.integers(0, 5800), byte=st.integers(0, 255), kept=st.integers(0, 6000))
def test_a_damaged_model_file_is_read_or_refused(at: int, byte: int, kept: int) -> None:
    data = bytearray((VECTORS / "unigram_merging_spaces.model").read_bytes())
    data[at] = byte
    with contextlib.suppress(CheckpointError):
        sentencepiece_file.read(bytes(data[:kept]))
