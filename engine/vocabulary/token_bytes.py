"""The exact bytes of every token, by the way in which its vocabulary spells bytes."""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import TYPE_CHECKING, Any

from engine.vocabulary import byte_level

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenizers import Tokenizer as Backend

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


class Spelling(Enum):
    """What a token's text says about its bytes. In the first two, a text is its tokens' bytes joined."""

    BYTE_LEVEL = "byte-level"  # 256 printable characters stand for the bytes
    SENTENCEPIECE = "sentencepiece"  # U+2581 is a space, <0xE2> is a byte
    OTHER = "other"  # a token's text depends on its neighbours


class TokenBytes:
    """`strips_space`: the vocabulary's decoder drops one space at the beginning of a text."""

    def __init__(self, backend: Backend, added: Mapping[int, str]) -> None:
        self._backend = backend
        self._added = added
        self._cache: dict[int, bytes] = {}
        self.spelling, self.strips_space = _spelling(backend)

    def of(self, token: int) -> bytes:
        """An added token's are its text in UTF-8; an unknown id has none."""
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._find(token)
        return found

    def _find(self, token: int) -> bytes:
        text = self._added.get(token)
        if text is not None:
            return self._spaced(text).encode()
        text = self._backend.id_to_token(token) if 0 <= token < 2**32 else None
        if text is None:
            return b""
        if self.spelling is Spelling.BYTE_LEVEL:
            return byte_level.to_bytes(text)
        byte = _BYTE.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()

    def _spaced(self, text: str) -> str:
        return text.replace(_SPACE, " ") if self.spelling is Spelling.SENTENCEPIECE else text


def _spelling(backend: Backend) -> tuple[Spelling, bool]:
    """By the decoder's steps, and whether they strip a space."""
    steps = _steps(backend)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return Spelling.BYTE_LEVEL, False
    if kinds == ["Metaspace"] and steps[0].get("replacement") == _SPACE:
        return Spelling.SENTENCEPIECE, steps[0].get("prepend_scheme") != "never"
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and _replaces_space(steps[0]):
        if kinds[3:] == []:
            return Spelling.SENTENCEPIECE, False
        if kinds[3:] == ["Strip"] and (steps[3].get("content"), steps[3].get("start")) == (" ", 1):
            return Spelling.SENTENCEPIECE, True
    return Spelling.OTHER, False


def _steps(backend: Backend) -> list[dict[str, Any]]:
    decoder = backend.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return list(state["decoders"]) if state.get("type") == "Sequence" else [state]


def _replaces_space(step: Mapping[str, Any]) -> bool:
    return step.get("pattern") == {"String": _SPACE} and step.get("content") == " "
