"""SentencePiece's merges by score, one by one: for vocabularies in which pieces share a score.

Where two different pieces have the same score, the leftmost pair is merged first; no ranks of pairs say that.
Vocabularies that were extended by hand have such pieces. This takes about a microsecond per character and log
of the word's length, holds the interpreter lock, and remembers words.
"""

from __future__ import annotations

import heapq
import itertools
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tokenizers import NormalizedString, PreTokenizedString

_MAX_WORDS = 20_000  # remembered
_MAX_REMEMBERED_CHARS = 64
_PARTS = 32
_MAX_TRIED_CHARS = 128  # of a piece; trying takes the square of it
_RUN_FACTOR = 4  # runs of up to this many times the longest piece are tried


class ScoredMerges:
    """A pre-tokeniser whose pieces are tokens already, but for characters that are none."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self._priority = by_score(scores)
        self._remembered = lru_cache(_MAX_WORDS)(self._merge)

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Cut in few parts, those again, and so on: the time of a cut grows with what it is taken from."""
        plans: list[tuple[int, ...]] = []

        def plan(_: int, word: NormalizedString) -> list[NormalizedString]:
            known = word.normalized
            merge = self._remembered if len(known) <= _MAX_REMEMBERED_CHARS else self._merge
            plans.append(merge(known))
            return [word]

        text.split(plan)
        while any(len(lengths) > 1 for lengths in plans):
            cutter = _Cutter(plans)
            text.split(cutter.cut)
            plans = cutter.left

    def _merge(self, word: str) -> tuple[int, ...]:
        return tuple(map(len, merged(word, self._priority)))


class _Cutter:
    """Cuts each word, in order, in at most `_PARTS` parts; `left`: what is left to cut in each of them."""

    def __init__(self, plans: list[tuple[int, ...]]) -> None:
        self._plans = iter(plans)
        self.left: list[tuple[int, ...]] = []

    def cut(self, _: int, word: NormalizedString) -> list[NormalizedString]:
        lengths = next(self._plans)
        step = -(-len(lengths) // _PARTS)
        parts = [lengths[at : at + step] for at in range(0, len(lengths), step)]
        self.left += parts
        ends = [0, *itertools.accumulate(map(sum, parts))]
        cuts = (word.slice((start, end)) for start, end in itertools.pairwise(ends))
        return [cut for cut in cuts if cut is not None]


def by_score(scores: Mapping[str, float]) -> Callable[[str, str], float | None]:
    """What is merged sooner is less; None for what is not merged."""

    def priority(left: str, right: str) -> float | None:
        score = scores.get(left + right)
        return None if score is None else -score

    return priority


def by_rank(merges: Sequence[tuple[str, str]]) -> Callable[[str, str], float | None]:
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return lambda left, right: ranks.get((left, right))


def merged(word: str, priority: Callable[[str, str], float | None]) -> list[str]:
    """The pieces of `word`: of all neighbours those of the least priority are merged, the leftmost first."""
    pieces, following = list(word), [*range(1, len(word)), -1]
    preceding = [*range(-1, len(word) - 1)]
    queue: list[tuple[float, int, int, int]] = []  # priority, left, right, length of both

    def propose(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            found = priority(pieces[left], pieces[right])
            if found is not None:
                heapq.heappush(queue, (found, left, right, len(pieces[left]) + len(pieces[right])))

    for right in range(1, len(pieces)):
        propose(right - 1, right)
    while queue:
        _, left, right, length = heapq.heappop(queue)
        if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != length:
            continue  # one of the two was merged otherwise meanwhile
        pieces[left] += pieces[right]
        pieces[right] = ""
        following[left] = following[right]
        if following[right] >= 0:
            preceding[following[right]] = left
        propose(preceding[left], left)
        propose(left, following[left])
    return [piece for piece in pieces if piece]


def ranks_suffice(scores: Mapping[str, float], merges: Sequence[tuple[str, str]]) -> bool:
    """Do `merges`, ranked, give the pieces that `scores` give, in every text?

    They do when no two pieces that are made by merging share a score. The first Llamas share one among runs
    of spaces; such runs are tried.
    """
    if any(character not in scores for piece in scores for character in piece):
        return False  # ranks say nothing of characters that are no pieces
    made = {left + right for left, right in merges}
    sharing: dict[float, list[str]] = {}
    for piece in made:
        sharing.setdefault(scores[piece], []).append(piece)
    tied = [piece for pieces in sharing.values() if len(pieces) > 1 for piece in pieces]
    longest = max(map(len, tied), default=0)
    if len(set("".join(tied))) > 1 or longest > _MAX_TRIED_CHARS:
        return False
    ranked, scored = by_rank(merges), by_score(scores)
    runs = (tied[0][0] * length for length in range(_RUN_FACTOR * longest)) if tied else ()
    return all(merged(run, ranked) == merged(run, scored) for run in runs)
