"""An index of token sequences by their n-grams, and guesses from where the present ending occurred before.

The index maps each n-gram (n = 1 .. 4) to its latest places. A query extends the places of the longest n-gram
that is known backwards to the longest common endings, and lets those vote on what follows, token by token.
Prompt lookup (Saxena 2023) takes the latest place alone; voting among the longest is ANPD's adaptive n-gram
(Ou 2024) and SuffixDecoding's scoring (Oliaro 2024) in one.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from engine.drafting.guess import NO_GUESS, Guess

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

LONGEST_KEY = 4
PLACES_PER_KEY = 8
LONGEST_MATCH = 32  # tokens; longer common endings count as this
_EVIDENCE_OF_LENGTH = (0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6)  # classes of 1 .. 16 tokens


class NgramIndex:
    """Over one list of tokens, which grows. Memory: about `LONGEST_KEY` entries for each token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # n-gram -> ends, the latest last

    def extend(self, tokens: SequenceOf[int]) -> None:
        own, places = self.tokens, self._places
        for token in tokens:
            own.append(token)
            end = len(own)
            for length in range(1, min(LONGEST_KEY, end) + 1):
                ends = places.setdefault(tuple(own[end - length :]), [])
                ends.append(end)
                if len(ends) > PLACES_PER_KEY:
                    del ends[0]

    def guess(self, context: SequenceOf[int], limit: int) -> Guess:
        """What may follow `context`, of which the last tokens are looked up. Its own end, if `context` is
        what was indexed, is not taken for a place where it occurred before."""
        matches = self._matches(context)
        if not matches:
            return NO_GUESS
        longest = max(length for length, _ in matches)
        ends = [end for length, end in matches if length == longest]
        tokens, agreed = self._vote(ends, limit)
        evidence = _EVIDENCE_OF_LENGTH[min(longest, len(_EVIDENCE_OF_LENGTH) - 1)]
        return Guess(tokens, 2 * evidence + agreed)

    def _matches(self, context: SequenceOf[int]) -> list[tuple[int, int]]:
        """(length of the common ending, where it ended before), for the longest n-gram that has any."""
        own = self.tokens
        for length in range(min(LONGEST_KEY, len(context)), 0, -1):
            ends = self._places.get(tuple(context[len(context) - length :]), ())
            found = [(self._common(context, end, length), end) for end in ends if end < len(own)]
            if found:
                return found
        return []

    def _common(self, context: SequenceOf[int], end: int, known: int) -> int:
        own, last = self.tokens, len(context)
        length = known
        most = min(LONGEST_MATCH, end, last)
        while length < most and own[end - 1 - length] == context[last - 1 - length]:
            length += 1
        return length

    def _vote(self, ends: list[int], limit: int) -> tuple[tuple[int, ...], bool]:
        """-> the tokens, and whether all places agreed on the first of them. Of a tie the latest wins."""
        tokens: list[int] = []
        agreed = True
        while len(tokens) < limit:
            following = [self.tokens[end] for end in ends if end < len(self.tokens)]
            if not following:
                break
            counts = Counter(reversed(following))
            token, votes = counts.most_common(1)[0]
            if not tokens:
                agreed = votes == len(following)
            tokens.append(token)
            ends = [end + 1 for end in ends if end < len(self.tokens) and self.tokens[end] == token]
        return tuple(tokens), agreed
