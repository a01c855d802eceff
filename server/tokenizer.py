"""Text to token ids and back. No torch; every method may be called from any thread."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from engine.checkpoint import Checkpoint, CheckpointError
from server import byte_level, vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from tokenizers import AddedToken


class Tokenizer:
    """`special` decides what the text of a special token ("<|im_end|>") is: the token, or plain text.

    The beginning-of-sequence token is never added here: `add_bos` says whether the checkpoint wants it
    before a prompt, and `bos_token_id` which one it is.
    """

    def __init__(
        self, backend: Backend, *, add_bos: bool | None = None, bos_token_id: int | None = None
    ) -> None:
        """`backend` is taken over. `add_bos` None: as the backend's own post-processor does."""
        self._backend = backend
        self._plain = _without_special(backend)
        self._added = dict(backend.get_added_tokens_decoder())
        self._special_ids = {token.content: index for index, token in self._added.items() if token.special}
        self._special_id_set = frozenset(self._special_ids.values())
        self._special_pattern = _pattern(token for token in self._added.values() if token.special)
        self._bytes: dict[int, bytes] = {}
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        leading = backend.encode("", add_special_tokens=True).ids[:1]
        self.add_bos = bool(leading) if add_bos is None else add_bos
        self.bos_token_id = leading[0] if leading and bos_token_id is None else bos_token_id

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """Raises CheckpointError when there is no vocabulary, or it is of a kind that is not supported."""
        if checkpoint.gguf is None:
            backend = vocabulary.from_json(checkpoint.path / "tokenizer.json")
        else:
            try:
                backend = vocabulary.from_gguf(checkpoint.gguf.metadata)
            except CheckpointError as error:
                raise CheckpointError(f"{checkpoint.path}: {error}") from error
        bos = checkpoint.special_tokens.get("bos_token")
        bos_id = backend.token_to_id(bos) if bos else None
        return cls(
            backend,
            add_bos=checkpoint.add_bos,
            bos_token_id=checkpoint.bos_token_id if bos_id is None else bos_id,
        )

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of `text`, in time near linear in its length, without the interpreter lock."""
        backend = self._backend if special else self._plain
        return backend.encode(_scalar_values(text), add_special_tokens=False).ids

    def encode_masked(self, text: str, plain: Mapping[str, str]) -> list[int]:
        """As `encode(text, special=True)`, but each character that is a key of `plain` is read as the
        plain text it stands for, which never becomes (part of) a special token."""
        if not plain:
            return self.encode(text, special=True)
        restore = str.maketrans(dict(plain))
        ids: list[int] = []
        at = 0
        for match in self._special_pattern.finditer(text):
            ids += self.encode(text[at : match.start()].translate(restore), special=False)
            ids.append(self._special_ids[match.group(match.lastindex or 0)])
            at = match.end()
        return ids + self.encode(text[at:].translate(restore), special=False)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a bare prompt: special tokens recognised, and begun as the checkpoint wants it."""
        ids = self.encode(text, special=True)
        if self.add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Unknown ids have no text."""
        if not self.is_byte_level:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special)
        kept = (token for token in ids if not (skip_special and self.is_special(token)))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes of one token; an added token's are its text in UTF-8, an unknown id has none."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._bytes_of(token)
        return found

    def is_special(self, token: int) -> bool:
        return token in self._special_id_set

    @property
    def special_texts(self) -> tuple[str, ...]:
        return tuple(self._special_ids)

    def save(self, path: Path) -> None:
        """Write the tokenizer.json that this is."""
        self._backend.save(str(path))

    def _bytes_of(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            return added.content.encode()
        text = self._backend.id_to_token(token) if 0 <= token < 2**32 else None
        if text is None:
            return b""
        return byte_level.to_bytes(text) if self.is_byte_level else _sentencepiece_bytes(text)


def _without_special(backend: Backend) -> Backend:
    """A second front to the same vocabulary, which reads the text of special tokens as plain text."""
    plain = Backend(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    plain.add_tokens([added[index] for index in sorted(added)])
    plain.encode_special_tokens = True
    return plain


def _pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Matches any special token, the longest first, with the white space that it swallows."""
    alternatives = [
        (r"\s*" if token.lstrip else "") + f"({re.escape(token.content)})" + (r"\s*" if token.rstrip else "")
        for token in sorted(tokens, key=lambda token: -len(token.content))
    ]
    return re.compile("|".join(alternatives) or "(?!)")


def _scalar_values(text: str) -> str:
    """JSON can carry half a surrogate pair; no encoding of text can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _sentencepiece_bytes(token: str) -> bytes:
    """SentencePiece writes a space as U+2581, and a single byte as <0xE2>."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
