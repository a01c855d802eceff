"""What a checkpoint folder says about text: special tokens, the chat template, defaults of sampling."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.weights.errors import CheckpointError
from engine.weights.json_files import read_json_object, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# What a request may ask for; a default must not be what a request could not say. A top_k of -1 is off.
_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1.0, 2.0**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (sys.float_info.min, 10.0),
}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class FolderText:
    """generation_config.json and tokenizer_config.json, empty where the file is absent."""

    folder: Path
    generation: Mapping[str, Any]
    tokenizer: Mapping[str, Any]

    def special_tokens(self) -> dict[str, str]:
        """ "bos_token" and its like -> text. Written as a string, or as an object with the string in it."""
        found = {}
        for word in _SPECIAL:
            value = self.tokenizer.get(word)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[word] = text
        return found

    def named_end_ids(self) -> tuple[int, ...]:
        """The id of the tokeniser's own end token, which instruction-tuned models end a turn with."""
        text, added = self.special_tokens().get("eos_token"), self.tokenizer.get("added_tokens_decoder")
        if text is None or not isinstance(added, dict):
            return ()
        return tuple(
            int(token)
            for token, entry in added.items()
            if token.isdecimal() and isinstance(entry, dict) and entry.get("content") == text
        )

    def add_bos(self) -> bool | None:
        value = self.tokenizer.get("add_bos_token")
        return value if isinstance(value, bool) else None

    def chat_template(self) -> str | None:
        """chat_template.jinja, or else what tokenizer_config.json holds: a string, or a list with names."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return read_text(path)
        value = self.tokenizer.get("chat_template")
        named = value if isinstance(value, list) else [{"name": "default", "template": value}]
        for entry in named:
            if isinstance(entry, dict) and entry.get("name") == "default":
                template = entry.get("template")
                return template if isinstance(template, str) else None
        return None

    def default(self, name: str) -> float | None:
        """A number of generation_config.json. Raises CheckpointError when it is none, or out of range."""
        value = self.generation.get(name)
        if value is None:
            return None
        low, high = _RANGES[name]
        if type(value) not in (int, float) or not low <= value <= high:
            shown = f"generation_config.json {name} = {str(value)[:80]}"
            raise CheckpointError(f"{self.folder}: {shown} is not between {low:g} and {high:g}")
        return float(value)


def read(folder: Path) -> FolderText:
    return FolderText(
        folder, _if_there(folder / "generation_config.json"), _if_there(folder / "tokenizer_config.json")
    )


def _if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
