"""The vocabulary of a GGUF file (`tokenizer.ggml.*`), read as llama.cpp reads it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from engine.checkpoint import CheckpointError
from engine.vocabulary import pre_tokenizers, sentencepiece
from engine.vocabulary.document import Document, Vocabulary, build
from engine.vocabulary.sentencepiece import Piece, PieceType, Rules
from engine.weights import gguf_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.vocabulary.pre_tokenizers import PreTokenizer
    from engine.weights.gguf import Value

_log = logging.getLogger(__name__)

# Old files call these user-defined, although no user's text may become one.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<(start|end)_of_turn>", re.DOTALL)
_LOOKS_NAMED = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_NO_SPACE_AFTER = ("<unk>", "<s>", "<|endoftext|>")


def from_gguf(metadata: Mapping[str, Value]) -> Vocabulary:
    """Raises CheckpointError for a vocabulary that is damaged, or of a kind that is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind in ("gpt2", "gemma4"):
        return _byte_level(metadata, str(kind))
    if kind in ("llama", "t5"):
        return _sentencepiece(metadata, unigram=kind == "t5")
    shown = "missing" if kind is None else f"{str(kind)[:80]!r}"
    raise CheckpointError(
        f"tokenizer.ggml.model is {shown}; only 'gpt2', 'gemma4', 'llama' and 't5' can be read: "
        "serve the model from its folder with a tokenizer.json instead"
    )


def _byte_level(metadata: Mapping[str, Value], kind: str) -> Vocabulary:
    rules = _pre_tokenizer(metadata, kind)
    texts = _texts(metadata)
    types = _types(metadata, texts)
    merges = list(map(_pair, _strings(metadata, "merges")))
    made = rules.document({text: index for index, text in enumerate(texts)}, merges)
    made["added_tokens"] = _added(metadata, texts, types)
    return build(made, add_bos=rules.add_bos)


def _pre_tokenizer(metadata: Mapping[str, Value], kind: str) -> PreTokenizer:
    name = "gemma4" if kind == "gemma4" else str(metadata.get("tokenizer.ggml.pre") or "default")
    rules = pre_tokenizers.find(name)
    if rules is None:
        raise CheckpointError(
            f"tokenizer.ggml.pre = {name[:80]!r} is not supported: "
            "serve the model from its folder with a tokenizer.json instead"
        )
    if name == "default":
        _log.warning("tokenizer.ggml.pre is missing: how texts are cut into words is a guess")
    return rules


def _sentencepiece(metadata: Mapping[str, Value], *, unigram: bool) -> Vocabulary:
    texts = _texts(metadata)
    types = _types(metadata, texts)
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, tuple) or len(scores) != len(texts):
        raise CheckpointError("tokenizer.ggml.scores is missing or does not match tokenizer.ggml.tokens")
    pieces = [
        Piece(text, _number(score), kind) for text, score, kind in zip(texts, scores, types, strict=True)
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 2 if unigram else 0)
    rules = Rules(
        unigram=unigram,
        prefix=_flag(metadata, "add_space_prefix", not unigram),
        merge_spaces=_flag(metadata, "remove_extra_whitespaces", False),
        unknown_id=unknown if type(unknown) is int else None,
        characters=_bytes(metadata.get("tokenizer.ggml.precompiled_charsmap")),
    )
    if _flag(metadata, "treat_whitespace_as_suffix", False):
        raise CheckpointError("tokenizer.ggml.treat_whitespace_as_suffix is not supported")
    added = _added(metadata, texts, types)
    return sentencepiece.build(pieces, rules, added, add_bos=not unigram, bos_token_id=None if unigram else 1)


def _added(metadata: Mapping[str, Value], texts: Sequence[str], types: Sequence[PieceType]) -> list[Document]:
    """What is a token by its text: special ones, and those that the vocabulary's owner put in."""
    swallows_space = _is_phi3(metadata)
    return [
        sentencepiece.added_token(index, text, kind)
        | {"rstrip": swallows_space and text not in _NO_SPACE_AFTER}
        for index, (text, kind) in enumerate(zip(texts, types, strict=True))
        if kind in sentencepiece.BY_TEXT
    ]


def _is_phi3(metadata: Mapping[str, Value]) -> bool:
    """Phi-3's tokens swallow the white space behind them, which the file does not say."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _texts(metadata: Mapping[str, Value]) -> tuple[str, ...]:
    texts = tuple(text or f"[EMPTY_{index}]" for index, text in enumerate(_strings(metadata, "tokens")))
    if len(set(texts)) != len(texts):
        text, count = Counter(texts).most_common(1)[0]
        raise CheckpointError(f"tokenizer.ggml.tokens has {text[:40]!r} {count} times")
    return texts


def _types(metadata: Mapping[str, Value], texts: Sequence[str]) -> list[PieceType]:
    """The type of every token. The ends and the beginning are control tokens, where they look like it."""
    values = metadata.get("tokenizer.ggml.token_type", ())
    if not isinstance(values, tuple) or len(values) not in (0, len(texts)):
        raise CheckpointError("tokenizer.ggml.token_type does not match tokenizer.ggml.tokens in length")
    known: dict[Any, PieceType] = {int(kind): kind for kind in PieceType}
    types = [known.get(value, PieceType.NORMAL) for value in values] or [PieceType.NORMAL] * len(texts)
    named = {*gguf_text.end_ids(metadata), gguf_text.token_id(metadata, "bos")}
    return [
        PieceType.CONTROL if _is_special(text, kind, index in named) else kind
        for index, (text, kind) in enumerate(zip(texts, types, strict=True))
    ]


def _is_special(text: str, kind: PieceType, is_named: bool) -> bool:
    if kind is PieceType.USER_DEFINED:
        return is_named or _LOOKS_SPECIAL.fullmatch(text) is not None
    return kind is PieceType.CONTROL or (is_named and _LOOKS_NAMED.fullmatch(text) is not None)


def _strings(metadata: Mapping[str, Value], name: str) -> tuple[str, ...]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, tuple) or not value or not isinstance(value[0], str):
        raise CheckpointError(f"tokenizer.ggml.{name} is missing or not a list of strings")
    return value


def _pair(merge: str) -> tuple[str, str]:
    """Split at the first space that is not the first character."""
    left, _, right = merge.partition(" ")
    if left and right:
        return left, right
    at = merge.find(" ", 1)
    if at < 0:
        raise CheckpointError(f"tokenizer.ggml.merges: {merge[:80]!r} is not two tokens")
    return merge[:at], merge[at + 1 :]


def _flag(metadata: Mapping[str, Value], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"tokenizer.ggml.{name} = {str(value)[:80]} is not true or false")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float) or value != value:
        raise CheckpointError(f"tokenizer.ggml.scores: {str(value)[:80]} is not a number")
    return float(value)  # type: ignore[arg-type]


def _bytes(value: Value | None) -> bytes:
    if value is None:
        return b""
    if not isinstance(value, tuple) or not all(type(item) is int and -128 <= item < 256 for item in value):
        raise CheckpointError("tokenizer.ggml.precompiled_charsmap is not a list of bytes")
    return bytes(item & 255 for item in value)  # type: ignore[operator]
