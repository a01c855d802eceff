"""Guesses from what the server has answered before: retries, agents and templates repeat one another.

Outputs are kept by cache salt, of which tenants that are told apart by keys have each their own, so that
nothing of one shows in another's timing; in all at most `max_tokens` (of `TOKEN_BYTES` each), oldest first
out, a part of a salt's store at a time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from engine.drafting.guess import NO_GUESS
from engine.drafting.ngrams import LONGEST_KEY, NgramIndex, founded_of

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.drafting.guess import Guess, Seen, Want
    from scheduler.types import Sequence

MAX_INDEXED_AT_ONCE = 2048  # tokens, at some 6 us each: long outputs stop nobody's step
SEPARATOR = -1  # no token: a guess never runs from one output into the next


class PastOutputs:
    taps: tuple[int, ...] = ()

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._stores: OrderedDict[str, list[NgramIndex]] = OrderedDict()  # salt -> parts, the newest last
        self.num_tokens = 0
        self._unread: deque[tuple[str, list[int]]] = deque()  # salts and outputs, in the order of their ends
        self._num_unread = 0

    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        self._read()
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
        if not sequence.num_output:
            return
        # The end of the prompt leads to the first tokens of the answer.
        tokens = [SEPARATOR, *sequence.tokens[max(0, sequence.prompt_len - LONGEST_KEY) :]]
        self._unread.append((sequence.request.cache_salt, tokens))
        self._num_unread += len(tokens)
        while self._num_unread > self.max_tokens:
            self._num_unread -= len(self._unread.popleft()[1])

    def _read(self) -> None:
        """Index a part of what has ended. Where load is high nobody wants guesses, and nothing is read."""
        left = MAX_INDEXED_AT_ONCE
        while self._unread and left:
            salt, tokens = self._unread.popleft()
            self._index(salt, tokens[:left])
            if len(tokens) > left:
                self._unread.appendleft((salt, tokens[left:]))
            self._num_unread -= min(left, len(tokens))
            left -= min(left, len(tokens))

    def _index(self, salt: str, tokens: list[int]) -> None:
        parts = self._stores.setdefault(salt, [NgramIndex()])
        self._stores.move_to_end(salt)
        if len(parts[-1].tokens) > self.max_tokens // 4:
            parts.append(NgramIndex())
        parts[-1].extend(tokens)
        self.num_tokens += len(tokens)
        while self.num_tokens > self.max_tokens:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        salt, parts = next(iter(self._stores.items()))
        self.num_tokens -= len(parts.pop(0).tokens)
        if not parts:
            del self._stores[salt]
