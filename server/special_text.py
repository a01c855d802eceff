"""Keeps what people write from becoming special tokens when a chat template puts it into one string.

Where a user's string spells a special token ("<|im_end|>"), or ends with the beginning of one, those
characters are replaced by one private-use character before rendering. The tokeniser puts them back as
plain text (`Tokenizer.encode_masked`). Texts that spell none pass unchanged, ids and all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


class SpecialTextMask:
    """`plain` maps each private-use character that was put in to the text that it stands for."""

    def __init__(self, special_texts: tuple[str, ...], free: FreeCharacters) -> None:
        self.plain: dict[str, str] = {}
        self._free = free
        self._special = tuple(sorted(special_texts, key=len, reverse=True))
        self._beginnings = _beginnings(special_texts)

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
        for character, meaning in self.plain.items():
            text = text.replace(character, meaning)
        return text

    def _mask(self, text: str) -> str:
        for special in self._special:
            if special in text:
                text = text.replace(special, self._stand_in(special))
        # The other half of a token may follow in the next string: "<|im_" and "end|>".
        if text.endswith(self._beginnings):
            ending = max((start for start in self._beginnings if text.endswith(start)), key=len)
            text = text[: -len(ending)] + self._stand_in(ending)
        return text

    def _stand_in(self, text: str) -> str:
        for character, meaning in self.plain.items():
            if meaning == text:
                return character
        character = self._free.take()
        self.plain[character] = text
        return character


def _beginnings(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Every proper, non-empty beginning of a text. Of texts that begin like a word there are none: their
    first letter ends many innocent strings, which the template may compare with its own ("user")."""
    marked = (text for text in texts if not text[0].isalnum())
    return tuple({text[:length] for text in marked for length in range(1, len(text))})


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
