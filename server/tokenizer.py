"""Text to token ids and back. No torch; every method may be called from any thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.vocabulary import load as load_vocabulary
from engine.vocabulary.document import library_errors
from engine.vocabulary.token_bytes import Spelling, TokenBytes
from server.special_text import SpecialFinder, SpecialTexts, scalar_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from engine.checkpoint import Checkpoint
    from engine.vocabulary import Vocabulary

_LINE = "\n"  # no vocabulary merges it with the letters that follow


class Tokenizer:
    """`special` decides what the text of a special token ("<|im_end|>") is: the token, or plain text.

    The beginning-of-sequence token is never added here: `add_bos` says whether the checkpoint wants it
    before a prompt, and `bos_token_id` which one it is.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, add_bos: bool | None = None, bos_token_id: int | None = None
    ) -> None:
        """`add_bos`, `bos_token_id` None: as the vocabulary says."""
        backend = vocabulary.marked
        self._marked = backend
        self._plain = vocabulary.plain
        self._added = dict(backend.get_added_tokens_decoder())
        self._special_ids = {token.content: index for index, token in self._added.items() if token.special}
        self._special_id_set = frozenset(self._special_ids.values())
        self._special_finder = SpecialFinder(token for token in self._added.values() if token.special)
        self.special_texts = SpecialTexts(self._special_ids)
        self._bytes = TokenBytes(backend, {index: token.content for index, token in self._added.items()})
        self.joins_bytes = self._bytes.spelling is not Spelling.OTHER
        # One more than the last id: vocabularies have gaps, of which the library's count knows nothing
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        leading = backend.encode("", add_special_tokens=True).ids[:1]
        wanted = vocabulary.add_bos if add_bos is None else add_bos
        found = vocabulary.bos_token_id if bos_token_id is None else bos_token_id
        self.add_bos = bool(leading) if wanted is None else wanted
        self.bos_token_id = leading[0] if leading and found is None else found

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """Raises CheckpointError when there is no vocabulary, or it is of a kind that is not supported."""
        found = load_vocabulary(checkpoint)
        bos = checkpoint.special_tokens.get("bos_token")
        bos_id = found.marked.token_to_id(bos) if bos else None
        return cls(
            found,
            add_bos=checkpoint.add_bos,
            bos_token_id=checkpoint.bos_token_id if bos_id is None else bos_id,
        )

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of `text`, in time near linear in its length, without the interpreter lock."""
        backend = self._marked if special else self._plain
        with library_errors("a text"):
            return backend.encode(scalar_values(text), add_special_tokens=False).ids

    def encode_masked(self, text: str, plain: Mapping[str, str]) -> list[int]:
        """As `encode(text, special=True)`, but each character that is a key of `plain` is read as the
        plain text it stands for, which never becomes (part of) a special token."""
        if not plain:
            return self.encode(text, special=True)
        restore = str.maketrans(dict(plain))
        ids: list[int] = []
        at = 0
        for start, end, special in self._special_finder.find(text):
            ids += self.encode(text[at:start].translate(restore), special=False)
            ids.append(self._special_ids[special])
            at = end
        return ids + self.encode(text[at:].translate(restore), special=False)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a bare prompt: special tokens recognised, and begun as the checkpoint wants it."""
        ids = self.encode(text, special=True)
        if self.add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def encode_within(self, text: str) -> list[int]:
        """The ids of plain text in the middle of a text, without the space that SentencePiece puts before a
        beginning."""
        if self._bytes.strips_space:
            lead, ids = self.encode(_LINE, special=False), self.encode(_LINE + text, special=False)
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self.encode(text, special=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True, *, begins: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Unknown ids have no text.

        `begins`: the ids are a text's first ones. The space that SentencePiece puts before a text is left
        out then; in the middle of a text it is the space between two words.
        """
        if not self.joins_bytes:
            return self._marked.decode(list(ids), skip_special_tokens=skip_special)
        kept = (token for token in ids if not (skip_special and self.is_special(token)))
        raw = b"".join(map(self.token_bytes, kept))
        if begins and self._bytes.strips_space:
            raw = raw.removeprefix(b" ")
        return raw.decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes of one token; an added token's are its text in UTF-8, an unknown id has none."""
        return self._bytes.of(token)

    def is_special(self, token: int) -> bool:
        return token in self._special_id_set

    def described(self) -> str:
        """For people: "byte-level BPE, 49,152 tokens"."""
        prefix = "byte-level " if self._bytes.spelling is Spelling.BYTE_LEVEL else ""
        return f"{prefix}{type(self._marked.model).__name__}, {self._marked.get_vocab_size():,} tokens"

    def save(self, path: Path) -> None:
        """Write the tokenizer.json that this is."""
        self._marked.save(str(path))
