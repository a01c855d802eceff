"""A vocabulary as another vocabulary meets it: bytes of tokens, and tokens of bytes, whatever they are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from engine.vocabulary import load as load_vocabulary
from engine.vocabulary.document import library_errors
from engine.vocabulary.token_bytes import Spelling, TokenBytes
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.checkpoint import Checkpoint
    from engine.vocabulary import Vocabulary

_LINE = "\n"  # no vocabulary merges it with the letters that follow
_NO_TEXT = re.compile("([\udc80-\udcff]+)")  # bytes that are not UTF-8, as "surrogateescape" spells them
_FIRST_ESCAPE = 0xDC00
_BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")


class Speller:
    """`special`: text -> id of the special tokens. `bos`: what every text begins with, or None.
    `strips_space`: the first token of a text has a space that the text has not."""

    def __init__(
        self, vocabulary: Vocabulary, *, add_bos: bool | None = None, bos: int | None = None
    ) -> None:
        """Raises CheckpointError for vocabularies whose texts are not their tokens' bytes joined."""
        backend = vocabulary.marked
        added = backend.get_added_tokens_decoder()
        self._plain = vocabulary.plain
        self._backend = backend
        self._bytes = TokenBytes(backend, {index: token.content for index, token in added.items()})
        if self._bytes.spelling is Spelling.OTHER:
            raise CheckpointError("a token's text depends on its neighbours in this vocabulary")
        self.strips_space = self._bytes.strips_space
        self.special = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = {index: text for text, index in self.special.items()}
        self.size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        leading = backend.encode("", add_special_tokens=True).ids[:1]
        wanted = vocabulary.add_bos if add_bos is None else add_bos
        found = next((one for one in (bos, vocabulary.bos_token_id, *leading) if one is not None), None)
        self.bos = found if wanted or (wanted is None and leading) else None
        self._ids = self._ids_of_bytes()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Speller:
        """Raises CheckpointError."""
        try:
            vocabulary = load_vocabulary(checkpoint)
            text = checkpoint.special_tokens.get("bos_token")
            by_text = vocabulary.marked.token_to_id(text) if text else None
            bos = checkpoint.bos_token_id if by_text is None else by_text
            return cls(vocabulary, add_bos=checkpoint.add_bos, bos=bos)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error

    def bytes_of(self, token: int) -> bytes:
        """Of a special token: its text. Rows of the model that are no token have none."""
        return self._bytes.of(token)

    def special_text(self, token: int) -> str | None:
        return self._special_ids.get(token)

    def tokens(self) -> Iterable[tuple[bytes, int]]:
        """Every sequence of bytes that is a token; special ones are left out."""
        return self._ids.items()

    def token_of(self, raw: bytes) -> int | None:
        return self._ids.get(raw)

    def encode(self, raw: bytes, *, begins: bool) -> list[int]:
        """Tokens of a text: what is no UTF-8 (its last character may be unfinished) as tokens of single
        bytes, where there are any. Special tokens are text. `begins`: nothing stands before it."""
        ids: list[int] = []
        for number, part in enumerate(_NO_TEXT.split(raw.decode("utf-8", "surrogateescape"))):
            if number % 2:
                single = (self._ids.get(bytes([ord(escape) - _FIRST_ESCAPE])) for escape in part)
                ids += (token for token in single if token is not None)
            elif part:
                ids += self._encode_text(part, begins=begins and not ids)
        return ids

    def _encode_text(self, text: str, *, begins: bool) -> list[int]:
        with library_errors("a text"):
            if self.strips_space and not begins:  # without the space that a beginning gets
                lead = self._plain.encode(_LINE, add_special_tokens=False).ids
                ids = self._plain.encode(_LINE + text, add_special_tokens=False).ids
                if ids[: len(lead)] == lead:
                    return list(ids[len(lead) :])
            return list(self._plain.encode(text, add_special_tokens=False).ids)

    def _ids_of_bytes(self) -> dict[bytes, int]:
        """Where several tokens have the same bytes, one that is not the name of a byte is meant."""
        found: dict[bytes, int] = {}
        names: dict[bytes, int] = {}
        for token in range(self.size):
            raw = self._bytes.of(token)
            if raw and token not in self._special_ids:
                by_name = _BYTE_NAME.fullmatch(self._backend.id_to_token(token) or "")
                (names if by_name else found).setdefault(raw, token)
        return names | found
