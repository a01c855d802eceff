"""Token recycling (Luo 2024): what the target last said after a token, wherever that was, rejected drafts
included.

A table from each token to the target's latest sample after it, one for each cache salt; a guess follows it
from token to token. It costs nothing to fill: every row that verifies a draft says something about one token.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from engine.drafting.guess import line

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Guess, Seen, Want
    from scheduler.types import Sequence

UNKNOWN = -1
MAX_TABLES = 16  # salts; the one least recently used goes first
LONGEST = 8  # a chain of single candidates is hardly ever right for longer
BELIEF = 0.4
TOLD_TWICE = 1  # the target said the same after this token the time before


class Recycling:
    taps: tuple[int, ...] = ()

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._tables: OrderedDict[str, tuple[array[int], bytearray]] = OrderedDict()

    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        return [self._guess(want) for want in wants]

    def _guess(self, want: Want) -> Guess:
        table, steady = self._table(want.sequence)
        tokens: list[int] = []
        token = want.sequence.tokens[-1]
        told = TOLD_TWICE if steady[token] else 0
        while len(tokens) < min(want.limit, LONGEST) and (token := table[token]) != UNKNOWN:
            tokens.append(token)
        return line(tokens, [2 * min(depth, 4) + told for depth in range(len(tokens))], BELIEF)

    def observe(self, seen: SequenceOf[Seen]) -> None:
        for one in seen:
            if one.drawn:
                table, steady = self._table(one.sequence)
                for token, following in zip(one.tokens[-len(one.drawn) :], one.drawn, strict=True):
                    steady[token] = table[token] == following
                    table[token] = following

    def release(self, sequence: Sequence) -> None:
        """What was learned of it stays."""

    def _table(self, sequence: Sequence) -> tuple[array[int], bytearray]:
        salt = sequence.request.cache_salt
        found = self._tables.get(salt)
        if found is None:
            if len(self._tables) >= MAX_TABLES:
                self._tables.popitem(last=False)
            found = array("i", [UNKNOWN]) * self._vocab_size, bytearray(self._vocab_size)
            self._tables[salt] = found
        self._tables.move_to_end(salt)
        return found
