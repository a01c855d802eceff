"""The vocabulary of a folder: tokenizer.json, else tokenizer.model, else vocab.json and merges.txt.

Tokens that were added later stand in tokenizer_config.json and added_tokens.json; what the first file lacks
of them is put in.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine.checkpoint import CheckpointError
from engine.vocabulary import document, pre_tokenizers, sentencepiece, sentencepiece_file
from engine.weights import folder_text
from engine.weights.json_files import read_json_object, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from engine.vocabulary.document import Document, Vocabulary

_MAX_TOKENIZER_BYTES = 256 * 2**20
_WAY_OUT = "save the tokeniser with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
# Tokeniser classes whose vocab.json and merges.txt can be read, and how they cut texts into words.
_CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2"}


def from_folder(folder: Path, vocab_size: int) -> Vocabulary:
    """`vocab_size`: the model's rows. Raises CheckpointError."""
    config = _if_there(folder / "tokenizer_config.json")
    added = list(_added(folder, config))
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder / "tokenizer.json", added, vocab_size)
    if (folder / "tokenizer.model").is_file():
        return _from_pieces(folder / "tokenizer.model", added, config, vocab_size)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_merges(folder, added, config, vocab_size)
    raise CheckpointError(f"the tokeniser's file is missing: there is no tokenizer.json; {_WAY_OUT}")


def _from_json(path: Path, added: list[Document], vocab_size: int) -> Vocabulary:
    found = _read_json(path)
    try:
        _add(found, added)
        document.drop_beyond(found, vocab_size)
        return document.build(found)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer.json: {error}") from error


def _read_json(path: Path) -> Document:
    if path.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path.name}: more than {_MAX_TOKENIZER_BYTES} bytes")
    try:
        value: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: not a JSON object")
    return value


def _from_pieces(path: Path, added: list[Document], config: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    if path.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"tokenizer.model: more than {_MAX_TOKENIZER_BYTES} bytes")
    try:
        model = sentencepiece_file.read(path.read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer.model: {error}; {_WAY_OUT}") from error
    rules = sentencepiece_file.rules(model, legacy=config.get("legacy") is not False)
    pieces = sentencepiece_file.pieces(model)
    own = [
        sentencepiece.added_token(index, piece.text, piece.type, normalized=not model.prefix)
        for index, piece in enumerate(pieces)
        if piece.type in sentencepiece.BY_TEXT
    ]
    known = {entry["content"] for entry in added}
    entries = [*(entry for entry in own if entry["content"] not in known), *added]
    return sentencepiece.build(
        pieces,
        rules,
        entries,
        add_bos=config.get("add_bos_token", True) is True,
        bos_token_id=model.bos_id,
        vocab_size=vocab_size,
    )


def _from_merges(
    folder: Path, added: list[Document], config: Mapping[str, Any], vocab_size: int
) -> Vocabulary:
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    rules = pre_tokenizers.find(_CLASSES.get(name, ""))
    if rules is None:
        raise CheckpointError(
            f"tokenizer_class {name[:40]!r} without tokenizer.json is not supported; {_WAY_OUT}"
        )
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    made = rules.document(read_json_object(folder / "vocab.json"), merges)
    _add(made, added)
    document.drop_beyond(made, vocab_size)
    return document.build(made, add_bos=config.get("add_bos_token") is True)


def _add(made: Document, added: list[Document]) -> None:
    """Put in the added tokens that the document lacks."""
    own = document.added_tokens(made)
    known = {entry["content"] for entry in own}
    made["added_tokens"] = [*own, *(entry for entry in added if entry["content"] not in known)]


def _added(folder: Path, config: Mapping[str, Any]) -> Iterator[Document]:
    """Added tokens of tokenizer_config.json and added_tokens.json, each once."""
    seen = set()
    for token, entry in folder_text.added_tokens(config):
        seen.add(entry["content"])
        yield {**entry, "id": token}
    special = _special_texts(folder, config)
    for text, token in _if_there(folder / "added_tokens.json").items():
        if text not in seen and type(token) is int and token >= 0:
            yield {"id": token, "content": text, "special": text in special, "normalized": False}


def _special_texts(folder: Path, config: Mapping[str, Any]) -> set[str]:
    """Every text that special_tokens_map.json and tokenizer_config.json call a special token."""
    found = set()
    for source in (_if_there(folder / "special_tokens_map.json"), config):
        for word, value in source.items():
            if word.endswith("_token") or word == "additional_special_tokens":
                for item in value if isinstance(value, list) else [value]:
                    text = item.get("content") if isinstance(item, dict) else item
                    if isinstance(text, str):
                        found.add(text)
    return found


def _if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
