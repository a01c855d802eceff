"""Guesses from what the server has answered before: retries, agents and templates repeat one another.

Outputs are kept by cache salt, so that nothing of one tenant shows in another's timing; in all at most
`max_tokens` (about 0.8 KB each), oldest first out, a part of a salt's store at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from engine.drafting.guess import NO_GUESS
from engine.drafting.ngrams import NgramIndex, founded_of

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Guess, Seen, Want
    from scheduler.types import Sequence

SEPARATOR = -1  # no token: a guess never runs from one output into the next


class PastOutputs:
    taps: tuple[int, ...] = ()

    def __init__(self, max_tokens: int = 2**18) -> None:
        self.max_tokens = max_tokens
        self._stores: OrderedDict[str, list[NgramIndex]] = OrderedDict()  # salt -> parts, the newest last
        self.num_tokens = 0

    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        return [self._guess(want) for want in wants]

    def _guess(self, want: Want) -> Guess:
        """Of the salt's parts the one in which the longest ending was found, the newest of a tie."""
        best, best_founded = NO_GUESS, 0
        for index in self._stores.get(want.sequence.request.cache_salt, ()):
            found = index.guess(want.sequence.tokens, want.limit, stop=SEPARATOR)
            if found.tokens and (founded := founded_of(found.kinds[0])) >= best_founded:
                best, best_founded = found, founded
        return best

    def observe(self, seen: SequenceOf[Seen]) -> None:
        """Committed tokens say all."""

    def release(self, sequence: Sequence) -> None:
        output = sequence.tokens[sequence.prompt_len :]
        if not output:
            return
        salt = sequence.request.cache_salt
        parts = self._stores.setdefault(salt, [NgramIndex()])
        self._stores.move_to_end(salt)
        if len(parts[-1].tokens) > self.max_tokens // 4:
            parts.append(NgramIndex())
        before = len(parts[-1].tokens)
        # The end of the prompt leads to the first tokens of the answer.
        parts[-1].extend([SEPARATOR, *sequence.tokens[max(0, sequence.prompt_len - 4) :]])
        self.num_tokens += len(parts[-1].tokens) - before
        while self.num_tokens > self.max_tokens:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        salt, parts = next(iter(self._stores.items()))
        self.num_tokens -= len(parts.pop(0).tokens)
        if not parts:
            del self._stores[salt]
