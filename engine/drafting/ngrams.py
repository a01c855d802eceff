"""An index of token sequences by their n-grams, and guesses from where the present ending occurred before.

The index maps each n-gram (n = 1 .. 4) to its latest places. A query extends the places of the longest n-gram
that is known backwards to the longest common endings, and lets those vote on what follows: a tree, in which a
draft's share of the votes is how likely it seems. Prompt lookup (Saxena 2023) takes the latest place alone;
voting among the longest is ANPD's adaptive n-gram (Ou 2024) and SuffixDecoding's tree (Oliaro 2024) in one.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from engine.drafting.guess import NO_GUESS, ROOT, Guess, line

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

TOKEN_BYTES = 1024  # of memory that a token in an index takes at most; 0.7 to 0.97 KB were measured
LONGEST_KEY = 4
PLACES_PER_KEY = 8
LONGEST_MATCH = 32  # tokens; longer common endings count as this
BELIEF = 0.6  # that a draft without a rival stands
_CLASS_OF_LENGTH = (0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6)  # of common endings of 1 .. 16 tokens
_NUM_SHARES, _NUM_DEPTHS = 3, 3


class NgramIndex:
    """Over one list of tokens, which grows. Memory: about `LONGEST_KEY` entries, at most `TOKEN_BYTES`, for
    each token."""

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

    def guess(self, context: SequenceOf[int], limit: int, stop: int | None = None) -> Guess:
        """What may follow `context`, of which the last tokens are looked up, up to any `stop`. Its own end,
        if `context` is what was indexed, is not taken for a place where it occurred before."""
        matches = self._matches(context)
        if not matches:
            return NO_GUESS
        longest = max(length for length, _ in matches)
        ends = [end for length, end in matches if length == longest]
        founded = _CLASS_OF_LENGTH[min(longest, len(_CLASS_OF_LENGTH) - 1)]
        if len(ends) == 1:  # nearly always
            tokens = self.tokens[ends[0] : ends[0] + limit]
            if stop in tokens:
                del tokens[tokens.index(stop) :]
            return line(tokens, [_kind(founded, depth, 1.0) for depth in range(len(tokens))], BELIEF)
        return self._tree(ends, founded, limit, stop)

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

    def _tree(self, ends: list[int], founded: int, limit: int, stop: int | None) -> Guess:
        """The places vote on each next token, those that it is likeliest to come to first; of a tie the
        latest wins."""
        nodes: list[tuple[int, int, int, float]] = []  # token, parent, kind, belief
        open_nodes = [(-1.0, 0, ROOT, 0, ends)]  # - chance, number, node, depth of what follows it, places
        number = 0
        while open_nodes and len(nodes) < limit:
            chance, _, parent, depth, ends = heappop(open_nodes)
            followers = self._followers(ends, stop)
            for token, places in followers.items():
                share = len(places) / len(ends)
                nodes.append((token, parent, _kind(founded, depth, share), BELIEF * share))
                number += 1
                entry = (chance * share, number, len(nodes) - 1, depth + 1, [end + 1 for end in places])
                heappush(open_nodes, entry)
        return Guess(*zip(*nodes[:limit], strict=True)) if nodes else NO_GUESS

    def _followers(self, ends: list[int], stop: int | None) -> dict[int, list[int]]:
        """What follows at each of these places -> those that have most places first."""
        found: dict[int, list[int]] = {}
        for end in reversed(ends):
            if end < len(self.tokens) and self.tokens[end] != stop:
                found.setdefault(self.tokens[end], []).append(end)
        if len(found) < 2:
            return found
        return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


def founded_of(kind: int) -> int:
    """Of a draft's kind: the longer the common ending, the greater."""
    return kind // (_NUM_SHARES * _NUM_DEPTHS)


def _kind(founded: int, depth: int, share: float) -> int:
    by_share = 0 if share == 1.0 else 1 if share >= 0.5 else 2
    by_depth = 0 if depth == 0 else 1 if depth < 4 else 2
    return (founded * _NUM_SHARES + by_share) * _NUM_DEPTHS + by_depth
