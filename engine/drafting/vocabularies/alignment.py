"""The tokens that a draft model reads where the target has committed its own: the same text.

The text is cut into segments that no later token changes: behind special tokens, and from some length on
before a word. Each is encoded by itself, once; only what stands behind the last cut is encoded anew as it
grows. Where a cut lies depends on the tokens before it alone, so it does not matter in which steps a text
came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.vocabularies.speller import Speller

WORD_AFTER = 32  # tokens in a segment, from which on the next word begins another
LONGEST_SEGMENT = 128  # tokens, words or not
_SPACES = b" \t\r\n"


class Alignment:
    """One sequence's. `tokens`: of the draft model. Those before `num_fixed` stay as they are."""

    def __init__(self, target: Speller, draft: Speller) -> None:
        self.target = target
        self.draft = draft
        self.tokens: list[int] = [] if draft.bos is None else [draft.bos]
        self.num_fixed = len(self.tokens)
        self.open_from = 0  # the target's token that the last segment begins with
        self.num_read = 0  # of the target's tokens
        self._begins = True  # no text stands before the open segment

    def follow(self, committed: SequenceOf[int], most: int | None = None) -> None:
        """All of the target's tokens; those of the call before have only been added to. No more than `most`
        are read now."""
        end = len(committed) if most is None else min(len(committed), self.num_read + most)
        for at in range(self.num_read, end):
            self._read(committed, at)
        self.num_read = end
        del self.tokens[self.num_fixed :]
        self.tokens += self._encoded(committed[self.open_from : end])

    def spelled(self, committed: SequenceOf[int], raw: bytes) -> list[int]:
        """The draft model goes on with these bytes -> how the target may spell them (string-level matching:
        Timor 2025), behind its committed tokens as they are: the text of those is encoded with what follows
        from the last cut on, or from the last word on, where that gives the same tokens."""
        for start in self._starts(committed):
            tail = list(committed[start:])
            begins = self._begins and start == self.open_from
            before = self._raw(tail, begins=begins)
            ids = self.target.encode(_whole(before + raw), begins=begins)
            if ids[: len(tail)] == tail:
                return self._of(ids[len(tail) :], raw)
        return []

    def _starts(self, committed: SequenceOf[int]) -> list[int]:
        """Where the target's encoding may begin anew, earliest first; at last behind all committed tokens."""
        end = len(committed)
        word = next(
            (at for at in range(end - 1, self.open_from, -1) if self._begins_word(committed, at)), end
        )
        return sorted({self.open_from, word, end})

    def _of(self, ids: list[int], raw: bytes) -> list[int]:
        """The leading ones that spell just these bytes: a vocabulary may know a text by another spelling."""
        at = 0
        for number, token in enumerate(ids):
            spelling = self.target.bytes_of(token)
            if not spelling or self.target.special_text(token) or not raw.startswith(spelling, at):
                return ids[:number]
            at += len(spelling)
        return ids

    def _read(self, committed: SequenceOf[int], at: int) -> None:
        special = self.target.special_text(committed[at])
        if special is not None:
            self._close(committed, at)
            self.open_from = at + 1
            if at or committed[at] != self.target.bos:  # instead of which the draft model has its own
                self._fix(self._special(special))
                self._begins = False
        elif at - self.open_from >= WORD_AFTER and (
            at - self.open_from >= LONGEST_SEGMENT or self._begins_word(committed, at)
        ):
            self._close(committed, at)

    def _close(self, committed: SequenceOf[int], end: int) -> None:
        """The open segment ends before token `end`."""
        if end > self.open_from:
            self._fix(self._encoded(committed[self.open_from : end]))
            self.open_from = end
            self._begins = False

    def _fix(self, tokens: list[int]) -> None:
        del self.tokens[self.num_fixed :]
        self.tokens += tokens
        self.num_fixed = len(self.tokens)

    def _encoded(self, tokens: SequenceOf[int]) -> list[int]:
        return self.draft.encode(self._raw(tokens, begins=self._begins), begins=self._begins)

    def _raw(self, tokens: SequenceOf[int], *, begins: bool) -> bytes:
        raw = b"".join(map(self.target.bytes_of, tokens))
        return raw.removeprefix(b" ") if begins and self.target.strips_space else raw

    def _special(self, text: str) -> list[int]:
        """A special token of both is itself, one of the target alone is its text."""
        known = self.draft.special.get(text)
        return [known] if known is not None else self.draft.encode(text.encode(), begins=False)

    def _begins_word(self, committed: SequenceOf[int], at: int) -> bool:
        """Vocabularies cut there too."""
        raw, before = (self.target.bytes_of(committed[number]) for number in (at, at - 1))
        return len(raw) > 1 and raw[:1] == b" " and raw[1] not in _SPACES and before[-1:] not in (b" ", b"\n")


def _whole(raw: bytes) -> bytes:
    """Without a last character that is not whole."""
    for cut in range(1, min(4, len(raw) + 1)):
        lead = raw[-cut]
        if lead >= 0xC0:
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return raw[:-cut] if cut < length else raw
        if lead < 0x80:
            break
    return raw
