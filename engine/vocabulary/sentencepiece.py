"""SentencePiece vocabularies: BPE by scores, or Unigram, both with bytes for characters that are no pieces.

SentencePiece (Kudo and Richardson 2018, https://aclanthology.org/D18-2012) merges whichever two neighbours
make the piece of the highest score, the leftmost first. The Rust library merges by the rank of a pair. The
two agree when every piece that two others make has a score of its own (as the trainer writes them), and the
pairs that make the same piece are ranked as `_order` says; else `scored_merges.py` merges.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from engine.checkpoint import CheckpointError
from engine.vocabulary import document, scored_merges
from engine.vocabulary.scored_merges import ScoredMerges

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.vocabulary.document import Document, Vocabulary

SPACE = "\u2581"
_MAX_PIECE_CHARS = 1024  # each is split in every way; trainers stop at 16, and by hand come runs of spaces
_SPACE_WITHIN = re.compile(f"[^{SPACE}]{SPACE}")
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_BEFORE_HEX = "(?<=<)(?=0x[0-9A-F]{2}>)"  # the library's Unigram would take the text "<0x41>" for the byte


class PieceType(IntEnum):
    """As SentencePiece's model file and GGUF number them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


BY_TEXT = frozenset({PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED})  # found before all else


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    unigram: bool
    prefix: bool  # a space is put before a text, and before what follows a special token
    merge_spaces: bool  # spaces at the ends are dropped, runs of them become one
    unknown_id: int | None
    characters: bytes = b""  # the compiled map of characters to characters (NFKC and its like)
    prefix_first_only: bool = False  # ... not before what follows a special token


def build(
    pieces: Sequence[Piece],
    rules: Rules,
    added: list[Document],
    *,
    add_bos: bool | None = None,
    bos_token_id: int | None = None,
    vocab_size: int | None = None,
) -> Vocabulary:
    """The tokeniser of `pieces`, whose index is their id, cut to the model's rows. Raises CheckpointError."""
    scores = {piece.text: piece.score for piece in pieces if _in_text(piece)}
    longest = max(scores, key=len, default="")
    if len(longest) > _MAX_PIECE_CHARS:
        raise CheckpointError(
            f"piece {longest[:40]!r}... has {len(longest)} characters; at most {_MAX_PIECE_CHARS} are read"
        )
    merges = [] if rules.unigram else _merges(scores)
    made: Document = {
        "added_tokens": added,
        "normalizer": _normalizer(rules),
        "pre_tokenizer": _pre_tokenizer(pieces, rules),
        "decoder": decoder(strip=rules.prefix),
        "model": _unigram(pieces, rules) if rules.unigram else _bpe(pieces, rules, merges),
    }
    by_score = None if scored_merges.ranks_suffice(scores, merges) else ScoredMerges(scores)
    if by_score is not None:
        made["model"] |= {"merges": [], "ignore_merges": True}
    document.drop_beyond(made, len(pieces) if vocab_size is None else vocab_size)
    return document.build(made, by_score, add_bos=add_bos, bos_token_id=bos_token_id)


def added_token(index: int, text: str, kind: PieceType, *, normalized: bool = False) -> Document:
    """A token by its text. What the vocabulary's owner put in is no special token.

    `normalized`: the text is looked for where spaces are U+2581 already.
    """
    special = kind is not PieceType.USER_DEFINED
    return {"id": index, "content": text, "special": special, "normalized": normalized and not special}


def decoder(*, strip: bool) -> Document:
    """U+2581 to spaces, bytes to characters; `strip`: the space that was put before the text is taken off."""
    steps: list[Document] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _normalizer(rules: Rules) -> Document:
    steps: list[Document] = []
    if rules.characters:
        steps.append(
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(rules.characters).decode()}
        )
    if rules.merge_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if rules.prefix and not rules.prefix_first_only:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _pre_tokenizer(pieces: Sequence[Piece], rules: Rules) -> Document | None:
    """Words, where no piece reaches from one into the next: the merges are the same, and found faster."""
    steps: list[Document] = []
    if rules.prefix and rules.prefix_first_only:
        steps.append({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False})
    if rules.unigram:
        steps.append(_split(_BEFORE_HEX))
    if not any(_SPACE_WITHIN.search(piece.text) for piece in pieces if _in_text(piece)):
        steps.append(_split(f"{SPACE}*[^{SPACE}]+|{SPACE}+"))
    return {"type": "Sequence", "pretokenizers": steps} if steps else None


def _split(pattern: str) -> Document:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _in_text(piece: Piece) -> bool:
    """May characters of a text be merged to this piece? Those of `BY_TEXT` are found before."""
    return piece.type is PieceType.NORMAL


def _unknown(pieces: Sequence[Piece], rules: Rules) -> int | None:
    unknown = rules.unknown_id
    if unknown is not None and not 0 <= unknown < len(pieces):
        raise CheckpointError(f"the unknown token {unknown} is beyond the vocabulary of {len(pieces)}")
    return unknown


def _has_bytes(pieces: Sequence[Piece]) -> bool:
    return sum(_BYTE.fullmatch(piece.text) is not None for piece in pieces) == 256


def _bpe(pieces: Sequence[Piece], rules: Rules, merges: list[tuple[str, str]]) -> Document:
    unknown = _unknown(pieces, rules)
    return {
        "type": "BPE",
        "vocab": {piece.text: index for index, piece in enumerate(pieces)},
        "merges": merges,
        "unk_token": None if unknown is None else pieces[unknown].text,
        "fuse_unk": True,
        "byte_fallback": _has_bytes(pieces),
    }


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best first."""
    found = []
    for text in sorted((text for text in scores if len(text) > 1), key=scores.__getitem__, reverse=True):
        pairs = [
            (text[:at], text[at:])
            for at in range(1, len(text))
            if text[:at] in scores and text[at:] in scores
        ]
        found += sorted(pairs, key=_order)
    return found


def _order(pair: tuple[str, str]) -> bool:
    """Where x, y, z are neighbours and xy = yz, the left pair comes first: (x, y) before (y, z).

    y begins the piece then, as only its right half can.
    """
    left, right = pair
    return not (left + right).startswith(right)


def _unigram(pieces: Sequence[Piece], rules: Rules) -> Document:
    return {
        "type": "Unigram",
        "unk_id": _unknown(pieces, rules),
        "vocab": [[piece.text, piece.score] for piece in pieces],
        "byte_fallback": _has_bytes(pieces),
    }
