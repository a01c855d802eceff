"""Keeps what people write from becoming special tokens when a chat template puts it into one string.

Where a user's string spells a special token ("<|im_end|>"), or ends with the beginning of one, those
characters are replaced by one private-use character before rendering. The tokeniser puts them back as
plain text (`Tokenizer.encode_masked`). Texts that spell none pass unchanged, ids and all.

Vocabularies have thousands of special tokens, and texts are long: nothing here grows with both.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class NoFreeCharacter(Exception):
    """The texts use every private-use character."""


class FreeCharacters:
    """Private-use characters that occur in none of `texts`, each given out once."""

    def __init__(self, texts: Iterable[str]) -> None:
        used = frozenset().union(*texts)
        self._free = (char for char in map(chr, _PRIVATE_USE) if char not in used)

    def take(self) -> str:
        """Raises NoFreeCharacter when the texts use up all of them."""
        for character in self._free:
            return character
        raise NoFreeCharacter("the text uses every private-use character")


class SpecialFinder:
    """Finds special tokens as the library does: the leftmost and then the longest, in linear time."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._backend = Backend(models.WordLevel({"": 0}, unk_token=""))  # all other text is one token
        self._backend.add_special_tokens(list(tokens))
        self._texts = {
            index: token.content for index, token in self._backend.get_added_tokens_decoder().items()
        }

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, the token's text), with the white space that the token swallows."""
        found = self._backend.encode(scalar_values(text), add_special_tokens=False)
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if token in self._texts:
                yield start, end, self._texts[token]


class SpecialTexts:
    """The texts of a vocabulary's special tokens, wherever they stand."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self._finder = SpecialFinder(AddedToken(text, special=True, normalized=False) for text in self.texts)
        # Most strings have none of these, which is seen sooner than it is looked up in the library
        beginnings = re.escape("".join({text[0] for text in self.texts}))
        self._beginning = re.compile(f"[{beginnings}]" if beginnings else "(?!)")
        # Of texts that begin like a word no beginnings count: their first letter ends many innocent
        # strings, which the template may compare with its own ("user").
        self._marked = sorted(text for text in self.texts if not text[0].isalnum())
        self._first = frozenset(text[0] for text in self._marked)
        self._longest = max(map(len, self._marked), default=0)

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        return self._finder.find(text) if self._beginning.search(text) else iter(())

    def begun_at_end(self, text: str) -> str:
        """The longest ending of `text` that a special token begins with; a whole token is none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first:
                ending = text[start:]
                at = bisect_left(self._marked, ending)
                if at < len(self._marked) and self._marked[at].startswith(ending):
                    return ending
        return ""


class SpecialTextMask:
    """`plain` maps each private-use character that was put in to the text that it stands for."""

    def __init__(self, special: SpecialTexts, free: FreeCharacters) -> None:
        self.plain: dict[str, str] = {}
        self._stand_ins: dict[str, str] = {}
        self._free = free
        self._special = special

    def apply(self, value: Any) -> Any:
        """Mask every string within dicts and lists, keys included."""
        if isinstance(value, str):
            return self._mask(value)
        if isinstance(value, list | tuple):
            return [self.apply(item) for item in value]
        if isinstance(value, dict):
            return {self.apply(key): self.apply(item) for key, item in value.items()}
        return value

    def restore(self, text: str) -> str:
        return text.translate({ord(character): meaning for character, meaning in self.plain.items()})

    def _mask(self, text: str) -> str:
        pieces: list[str] = []
        at = 0
        for start, end, special in self._special.find(text):
            pieces += text[at:start], self._stand_in(special)
            at = end
        # The other half of a token may follow in the next string: "<|im_" and "end|>".
        rest = text[at:]
        ending = self._special.begun_at_end(rest)
        if ending:
            pieces += rest.removesuffix(ending), self._stand_in(ending)
        else:
            pieces.append(rest)
        return "".join(pieces)

    def _stand_in(self, text: str) -> str:
        if text not in self._stand_ins:
            character = self._stand_ins[text] = self._free.take()
            self.plain[character] = text
        return self._stand_ins[text]


def scalar_values(text: str) -> str:
    """JSON can carry half a surrogate pair; no encoding of text can. Every other character stays in place."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def strings_in(value: Any) -> Iterator[str]:
    """Every string within dicts and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
