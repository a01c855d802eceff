"""Reads tokenizer.model, SentencePiece's own file: a protobuf message, `sentencepiece_model.proto`.

Only the fields that decide ids are read. The wire format (https://protobuf.dev/programming-guides/encoding)
is a row of (number of the field, kind of value, value); the file's size bounds everything in it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.checkpoint import CheckpointError
from engine.vocabulary.sentencepiece import SPACE, Piece, PieceType, Rules

if TYPE_CHECKING:
    from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM, _BPE = 1, 2
_MAX_VARINT_BYTES = 10

# Fields of ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _SPACE_AS_SUFFIX, _UNK_ID, _BOS_ID = 3, 24, 40, 41
_CHARACTERS, _DUMMY_PREFIX, _MERGE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5

Value = int | bytes


@dataclass(frozen=True, slots=True)
class Model:
    pieces: tuple[Piece, ...]
    unigram: bool
    unk_id: int
    bos_id: int | None
    characters: bytes
    prefix: bool
    merge_spaces: bool


def read(data: bytes) -> Model:
    """Raises CheckpointError for what is damaged, or of a kind that is not supported."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.append(_piece(_message(value)))
        elif number == _TRAINER:
            trainer = _message(value)
        elif number == _NORMALIZER:
            normalizer = _message(value)
    if not pieces:
        raise CheckpointError("it has no pieces")
    kind = _int(trainer, _MODEL_TYPE, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise CheckpointError(f"model type {kind} is not supported (only 1, unigram, and 2, bpe)")
    if _int(trainer, _SPACE_AS_SUFFIX, 0) or not _int(normalizer, _ESCAPE_SPACES, 1):
        raise CheckpointError("spaces that end a piece, or are written as they are, are not supported")
    bos = _int(trainer, _BOS_ID, 1)
    return Model(
        pieces=tuple(pieces),
        unigram=kind == _UNIGRAM,
        unk_id=_int(trainer, _UNK_ID, 0),
        bos_id=bos if bos < len(pieces) else None,
        characters=_raw(normalizer, _CHARACTERS),
        prefix=bool(_int(normalizer, _DUMMY_PREFIX, 1)),
        merge_spaces=bool(_int(normalizer, _MERGE_SPACES, 1)),
    )


def rules(model: Model, *, legacy: bool) -> Rules:
    """`legacy`: a space is put before what follows a special token, too, as transformers once did."""
    return Rules(
        unigram=model.unigram,
        prefix=model.prefix,
        merge_spaces=model.merge_spaces,
        unknown_id=model.unk_id,
        characters=model.characters,
        prefix_first_only=not legacy,
    )


def pieces(model: Model) -> list[Piece]:
    """What the owner put in is looked for before the rest. Where a space is put before texts, that is before
    spaces become U+2581, and so they are no U+2581 in it either."""
    return [
        replace(piece, text=piece.text.replace(SPACE, " "))
        if model.prefix and piece.type is PieceType.USER_DEFINED
        else piece
        for piece in model.pieces
    ]


def _piece(fields: dict[int, Value]) -> Piece:
    kinds = {int(kind): kind for kind in PieceType}
    kind = _int(fields, _PIECE_TYPE, PieceType.NORMAL)
    if kind not in kinds:
        raise CheckpointError(f"a piece has type {kind}")
    raw = fields.get(_PIECE_SCORE, b"\0\0\0\0")
    if not isinstance(raw, bytes) or len(raw) != 4:
        raise CheckpointError("a piece's score is not a number")
    score: float = struct.unpack("<f", raw)[0]
    if not math.isfinite(score):
        raise CheckpointError("a piece's score is not finite")
    try:
        return Piece(_raw(fields, _PIECE_TEXT).decode(), score, kinds[kind])
    except UnicodeDecodeError as error:
        raise CheckpointError("a piece is not UTF-8") from error


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of one message, in order. Fixed-size numbers stay bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value: Value
            value, at = _varint(data, at)
        elif wire in (_BYTES, _FIXED32, _FIXED64):
            size = 8 if wire == _FIXED64 else 4
            if wire == _BYTES:
                size, at = _varint(data, at)
            if size > len(data) - at:
                raise CheckpointError(f"it ends within a field ({size} bytes are promised)")
            value, at = data[at : at + size], at + size
        else:
            raise CheckpointError(f"it is damaged: a field of kind {wire} at byte {at}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, at + index + 1
    raise CheckpointError(f"it is damaged: no number at byte {at}")


def _message(value: Value) -> dict[int, Value]:
    """A message as number -> last value. Raises CheckpointError where it is none."""
    if not isinstance(value, bytes):
        raise CheckpointError("it is damaged: a number instead of a message")
    return dict(_fields(value))


def _int(fields: dict[int, Value], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise CheckpointError(f"it is damaged: field {number} is not a number")
    return value


def _raw(fields: dict[int, Value], number: int) -> bytes:
    value = fields.get(number, b"")
    if not isinstance(value, bytes):
        raise CheckpointError(f"it is damaged: field {number} is a number")
    return value
