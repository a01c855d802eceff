"""What a checkpoint folder says about text: special tokens, chat templates, defaults of generation."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.weights.errors import CheckpointError
from engine.weights.json_files import read_json_object, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TEMPLATE_NAME = re.compile(r"[\w-]{1,64}")
_MAX_TEMPLATES = 32
_ID = re.compile("[0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class FolderText:
    """The folder's small JSON files, empty where a file is absent."""

    folder: Path
    generation: Mapping[str, Any]  # generation_config.json
    tokenizer: Mapping[str, Any]  # tokenizer_config.json
    special: Mapping[str, Any]  # special_tokens_map.json
    added: Mapping[str, Any]  # added_tokens.json: text -> id
    generation_problem: str = ""  # why generation_config.json cannot be read

    def special_tokens(self) -> dict[str, str]:
        """ "bos_token" and its like -> text. Written as a string, or as an object with the string in it."""
        found = {}
        for word in _SPECIAL:
            # Null in the first file means that there is none, whatever the other one says
            source = self.tokenizer if word in self.tokenizer else self.special
            value = source.get(word)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[word] = text
        return found

    def named_end_ids(self) -> tuple[int, ...]:
        """The id of the tokeniser's own end token, which instruction-tuned models end a turn with. Only
        where these files say it: the vocabulary is not read here."""
        text = self.special_tokens().get("eos_token")
        if text is None:
            return ()
        entries = added_tokens(self.tokenizer)
        found = [self.added.get(text), *(token for token, entry in entries if entry["content"] == text)]
        return tuple(token for token in found if type(token) is int and token >= 0)

    def add_bos(self) -> bool | None:
        value = self.tokenizer.get("add_bos_token")
        return value if isinstance(value, bool) else None

    def chat_templates(self) -> dict[str, str]:
        """Templates by name; the usual one is "default". Files of templates precede tokenizer_config.json,
        and chat_template.json, which is a processor's, comes last."""
        processor = _if_there(self.folder / "chat_template.json")
        found = dict(_named(processor.get("chat_template")))
        found |= _named(self.tokenizer.get("chat_template"))
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            found["default"] = read_text(path)
        for path in sorted(self.folder.glob("additional_chat_templates/*.jinja"))[:_MAX_TEMPLATES]:
            if TEMPLATE_NAME.fullmatch(path.stem):
                found[path.stem] = read_text(path)
        return found


def read(folder: Path) -> FolderText:
    """Raises CheckpointError, but not for generation_config.json: whoever wants no defaults needs none."""
    problem = ""
    try:
        generation = _if_there(folder / "generation_config.json")
    except CheckpointError as error:
        generation, problem = {}, str(error)
    return FolderText(
        folder,
        generation,
        _if_there(folder / "tokenizer_config.json"),
        _if_there(folder / "special_tokens_map.json"),
        _if_there(folder / "added_tokens.json"),
        problem,
    )


def added_tokens(config: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The entries of tokenizer_config.json's "added_tokens_decoder" that have a text, by their ids."""
    entries = config.get("added_tokens_decoder")
    for token, entry in entries.items() if isinstance(entries, dict) else ():
        if _ID.fullmatch(token) and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield int(token), entry


def _named(value: object) -> Iterator[tuple[str, str]]:
    """A template alone, or several: an object by name, or a list of {"name": ..., "template": ...}."""
    if isinstance(value, str):
        yield "default", value
    pairs = value.items() if isinstance(value, dict) else ()
    entries = value[:_MAX_TEMPLATES] if isinstance(value, list) else ()
    for name, template in (
        *pairs,
        *((entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)),
    ):
        if isinstance(name, str) and isinstance(template, str) and TEMPLATE_NAME.fullmatch(name):
            yield name, template


def _if_there(path: Path) -> dict[str, Any]:
    """A link to nothing is there, and cannot be read."""
    return read_json_object(path) if os.path.lexists(path) else {}
