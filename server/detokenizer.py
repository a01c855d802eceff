"""Tokens to text as they arrive: every character as soon as its last byte is there, and never half of one."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 32  # more tokens than any character has bytes: the model is writing garbage


class IncrementalDetokenizer:
    """However the tokens are cut into pushes, the pieces joined are the text of all tokens at once.

    The tokens go on where others ended: a space before the first of them is shown.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._reader = (
            _Bytes(tokenizer, skip_special) if tokenizer.joins_bytes else _Prefixes(tokenizer, skip_special)
        )

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        return self._reader.push(ids)

    def flush(self) -> str:
        """The text ends here: what is left of an unfinished character becomes U+FFFD."""
        return self._reader.flush()


class _Bytes:
    """For vocabularies where the text is the tokens' bytes put together."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        tokenizer = self._tokenizer
        kept = (token for token in ids if not (self._skip_special and tokenizer.is_special(token)))
        return self._decoder.decode(b"".join(map(tokenizer.token_bytes, kept)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Prefixes:
    """For every other vocabulary, whose decoder wants to see a token's neighbours (WordPiece).

    The new text is the difference between decoding a few shown tokens, and those with the new ones.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []  # shown already; the decoder's view to the left
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        return "".join(map(self._push_one, ids))

    def flush(self) -> str:
        text = self._new_text()
        self._context, self._pending = self._pending, []
        return text

    def _push_one(self, token: int) -> str:
        self._pending.append(token)
        text = self._new_text()
        # A trailing U+FFFD is most likely a character whose other bytes are in the next tokens.
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MAX_PENDING:
            return ""
        if not text:  # special tokens that are left out, without an end
            del self._pending[:-_MAX_PENDING]
            return ""
        self._context, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)
