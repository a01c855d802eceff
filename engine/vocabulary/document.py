"""From a tokenizer.json document to the Rust library's tokeniser, with everything checked before and after.

Every source of vocabularies is turned into such a document first: there is one way to build a tokeniser. The
document is data from strangers. What the library does not check is checked here; what it answers with an
error, or with a panic of Rust, becomes a CheckpointError.
"""

from __future__ import annotations

import json
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.checkpoint import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from engine.vocabulary.scored_merges import ScoredMerges

Document = dict[str, Any]

_BPE_OPTIONS = (
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
_ADDED_FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")
_NO_MODEL = {"type": "BPE", "vocab": {}, "merges": []}
_AROUND = (("", ""), ("a", "a"), (" ", " "))
_KINDS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_PROBE = "A a\u0301 \u00e9 1234 \u4e2d\U0001f642\u2581 \t\r\n\0<s></s>\u200d\u05d0 the end's  "
_UNREACHABLE = "\U0010ffff" + secrets.token_hex(16)  # begins names that no text spells


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Two readers of one vocabulary, and what it says about the beginning of a prompt."""

    marked: Backend  # the text of a special token is that token
    plain: Backend  # the text of a special token is text
    add_bos: bool | None = None  # None: as the post-processor of `marked` does
    bos_token_id: int | None = None


def build(
    document: Document,
    words: ScoredMerges | None = None,
    *,
    add_bos: bool | None = None,
    bos_token_id: int | None = None,
) -> Vocabulary:
    """The tokeniser of `document`; `words` cuts what its own steps have cut. Raises CheckpointError.

    Truncation, padding and dropout are left out: they would cut, pad or vary the ids.
    """
    added = added_tokens(document)
    described = _with_added(checked_model(document), added)
    special = frozenset(entry["content"] for entry in added if entry.get("special") is True)
    with library_errors("the vocabulary"):
        model = _model(described, special)
        marked = _around(model, document, added, words)
        _check_ids(marked, added)
        marked.decode(marked.encode(_PROBE).ids)
        plain = _around(model, document, [entry for entry in added if entry["content"] not in special], words)
        if _reaches(plain, special, {entry["id"] for entry in added if entry["content"] in special}):
            apart = _model(_renamed(described, special), special)
            plain = _around(
                apart, document, [entry for entry in added if entry["content"] not in special], words
            )
        plain.encode(_PROBE)
    return Vocabulary(marked, plain, add_bos, bos_token_id)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Errors of the Rust library, its panics among them, as one line that begins with `what`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{what}: {_first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3's, which no module exports
            raise
        raise CheckpointError(f"{what}: the tokenizers library gave up: {_first_line(error)}") from error


def added_tokens(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checked entries of `added_tokens`, by id. Raises CheckpointError."""
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise CheckpointError("added_tokens is not a list")
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or entry["id"] < 0:
            raise CheckpointError(f"added_tokens: {str(entry)[:80]} has no id")
        if not isinstance(entry.get("content"), str) or not entry["content"]:
            raise CheckpointError(f"added_tokens: token {entry['id']} has no content")
    return sorted(entries, key=lambda entry: int(entry["id"]))


def drop_beyond(document: Document, vocab_size: int) -> None:
    """Forget added tokens for which the model has no row; any other token beyond is an error."""
    added = added_tokens(document)
    document["added_tokens"] = [entry for entry in added if entry["id"] < vocab_size]
    beyond = {entry["content"] for entry in added if entry["id"] >= vocab_size}
    vocabulary = checked_model(document)["vocab"]
    if isinstance(vocabulary, list):
        pieces = [(piece[0], index) for index, piece in enumerate(vocabulary) if index >= vocab_size]
    else:
        pieces = [(text, index) for text, index in vocabulary.items() if index >= vocab_size]
    for text, index in pieces:
        if text not in beyond:
            raise CheckpointError(
                f"token {index} {text[:40]!r} is beyond the model's vocabulary of {vocab_size}"
            )
    if isinstance(vocabulary, list):
        del vocabulary[vocab_size:]
    else:
        for text, _ in pieces:
            del vocabulary[text]


def checked_model(document: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` of the document, with its vocabulary's types and ids checked. Raises CheckpointError."""
    model = document.get("model")
    if not isinstance(model, dict):
        raise CheckpointError("there is no 'model'")
    model.setdefault("type", "BPE")  # very old files have no type
    if model["type"] not in _KINDS:
        raise CheckpointError(
            f"model type {str(model['type'])[:40]!r} is not supported (only {', '.join(_KINDS)})"
        )
    vocabulary = model.get("vocab")
    if model["type"] == "Unigram":
        if not isinstance(vocabulary, list) or not all(map(_is_piece, vocabulary)):
            raise CheckpointError("model.vocab is not a list of [text, score]")
    elif not isinstance(vocabulary, dict) or not all(type(index) is int for index in vocabulary.values()):
        raise CheckpointError("model.vocab does not map texts to ids")
    return model


def _with_added(model: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """The model with added tokens in its vocabulary: none is numbered anew. Raises CheckpointError."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        texts = {piece[0] for piece in vocabulary}
        new = [[entry["content"], 0.0] for entry in added if entry["content"] not in texts]
        return dict(model, vocab=[*vocabulary, *new])
    joined = {entry["content"]: entry["id"] for entry in added} | vocabulary
    if len(set(joined.values())) != len(joined) or min(joined.values(), default=0) < 0:
        raise CheckpointError("the vocabulary gives two texts the same id, or a negative one")
    return dict(model, vocab=joined)


def _is_piece(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and isinstance(value[0], str)
        and type(value[1]) in (int, float)
    )


def _model(described: Mapping[str, Any], special: frozenset[str]) -> Any:
    """The library's model, without the merges that make a special token of the characters of its text."""
    if described["type"] != "BPE":
        return Backend.from_str(json.dumps({"version": "1.0", "model": described})).model
    options = {name: described[name] for name in _BPE_OPTIONS if described.get(name) is not None}
    merges = [pair for pair in _pairs(described.get("merges")) if pair[0] + pair[1] not in special]
    return models.BPE(vocab=described["vocab"], merges=merges, **options)


def _pairs(merges: object) -> list[tuple[str, str]]:
    """Merges are written as "left right", or as a pair."""
    if not isinstance(merges, list):
        raise CheckpointError("model.merges is not a list")
    try:
        halves = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        return [(left, right) for left, right in halves]
    except (TypeError, ValueError) as error:
        raise CheckpointError("model.merges is not a list of pairs") from error


def _around(
    model: Any, document: Document, added: list[dict[str, Any]], words: ScoredMerges | None
) -> Backend:
    """The steps of the document around `model`."""
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    steps = {name: document.get(name) for name in names}
    backend = Backend.from_str(json.dumps({"version": "1.0", "model": _NO_MODEL, **steps}))
    backend.model = model
    if words is not None:
        cuts = [backend.pre_tokenizer] if backend.pre_tokenizer else []
        last = pre_tokenizers.PreTokenizer.custom(words)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    backend.add_tokens([_added_token(entry) for entry in added])
    return backend


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {name: entry[name] for name in _ADDED_FLAGS if type(entry.get(name)) is bool}
    return AddedToken(entry["content"], **flags)


def _check_ids(backend: Backend, added: list[dict[str, Any]]) -> None:
    """An added token has one id, whichever part of the document is asked."""
    for entry in added:
        found = backend.token_to_id(entry["content"])
        if found != entry["id"]:
            raise CheckpointError(
                f"added token {entry['content'][:40]!r} is {entry['id']}, but {found} in the vocabulary"
            )


def _reaches(plain: Backend, special: frozenset[str], ids: set[int]) -> bool:
    """Does a special token's text become that token, in spite of all?"""
    long = (text for text in special if len(text) > 1)
    around = (f"{before}{text}{after}" for text in long for before, after in _AROUND)
    return any(not ids.isdisjoint(plain.encode(text, add_special_tokens=False).ids) for text in around)


def _renamed(model: dict[str, Any], special: frozenset[str]) -> dict[str, Any]:
    """The model, with special tokens under names that no text spells.

    A special token of one character keeps its name: no text with this character could be encoded without it.
    """
    names = {text: _UNREACHABLE + text for text in special if len(text) > 1}
    made = dict(model)
    if isinstance(model["vocab"], list):
        made["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    else:
        made["vocab"] = {names.get(text, text): index for text, index in model["vocab"].items()}
    if model["type"] == "BPE":
        made["merges"] = [pair for pair in _pairs(model.get("merges")) if names.keys().isdisjoint(pair)]
    if model.get("unk_token") in names:
        made["unk_token"] = names[model["unk_token"]]
    return made


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
