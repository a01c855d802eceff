"""Token recycling (Luo 2024, "Turning Trash into Treasure"): what the target would say after each token.

Every row that the target computes says what may follow one token, be it a token of the text or a draft that
was rejected. A table keeps the latest few candidates after each token, one table for each cache salt. From
the last committed token on a guess follows them as a tree, the likeliest first.

Where draws are random, candidates could be ranked with the noise of their places, as the target ranks its
own. On the default model, at temperatures 0.7 and 1.0, that gave 1.5 % more tokens in a step with 8 drafts
and none more with 16: the candidates are those of another context. Finding the noise takes longer than all
the rest of a guess, so they are taken as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from engine.drafting.guess import NO_GUESS, ROOT, Guess

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from engine.drafting.guess import Seen, Want
    from scheduler.types import Sequence

CANDIDATES = 8  # after each token
MAX_DRAFTS = 24  # of a guess
LEAST_CHANCE = 0.02  # of a draft, with all that it follows
MAX_ROWS = 64  # of a step are looked at; on a CPU that takes 15 us each, and some time for each call:
FEW_ROWS = 4  # of a sequence: they are copied, to be looked at together with others'
CHUNK = 128  # logits; see `largest`

# How often the k-th candidate stands, by how many times in a row the target put the same one first. From nine
# texts of the default model; what is learned of each kind later counts for more.
STEADY = 3  # as often or more
FIRST = (0.0, 0.3, 0.6, 0.8)  # by times
OTHERS = (0.11, 0.07, 0.055, 0.045, 0.035, 0.03, 0.025)
BELIEFS = tuple((first, *OTHERS) for first in FIRST)


class _Table(NamedTuple):
    """36 bytes for each token of the vocabulary, of which the system provides what is touched."""

    tokens: NDArray[np.int32]  # [V, CANDIDATES], the likeliest first
    times: NDArray[np.uint8]  # [V] how often in a row that was the first; 0: nothing is known; at most STEADY


class Recycling:
    taps: tuple[int, ...] = ()

    def __init__(self, vocab_size: int, max_bytes: int) -> None:
        """`max_bytes`: of all tables, if every token occurs in each; where none fits, nothing is guessed."""
        self._vocab_size = vocab_size
        self._width = min(CANDIDATES, vocab_size)
        table_bytes = vocab_size * (4 * self._width + 1)
        self._max_tables = max_bytes // table_bytes
        self._turn = 0
        self._tables: OrderedDict[str, _Table] = OrderedDict()  # by salt; the one least recently used goes

    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        return [self._guess(want) if self._max_tables else NO_GUESS for want in wants]

    def _guess(self, want: Want) -> Guess:
        """Best first: a node taken offers its first child and its next sibling, which are no likelier."""
        all_tokens, all_times = self._table(want.sequence.request.cache_salt)
        limit = min(want.limit, MAX_DRAFTS)
        tokens: list[int] = []
        parents: list[int] = []
        kinds: list[int] = []
        beliefs: list[float] = []
        # - chance, unique, rank, parent, depth, - chance of the parent, candidates, times
        front: list[tuple[float, int, int, int, int, float, list[int], int]] = []
        token, depth, chance, parent, number = want.sequence.tokens[-1], 0, -1.0, ROOT, 0
        while len(tokens) < limit:
            if times := int(all_times[token]):
                number += 1
                entry = (chance * FIRST[times], number, 0, parent, depth, chance)
                heappush(front, (*entry, all_tokens[token].tolist(), times))
            if not front or front[0][0] > -LEAST_CHANCE:
                break
            chance, _, rank, before, depth, above, candidates, times = heappop(front)
            if rank + 1 < self._width:
                number += 1
                entry = (above * BELIEFS[times][rank + 1], number, rank + 1, before, depth, above)
                heappush(front, (*entry, candidates, times))
            parent, token = len(tokens), candidates[rank]
            tokens.append(token)
            parents.append(before)
            kinds.append(_kind(rank, depth, times))
            beliefs.append(BELIEFS[times][rank])
            depth += 1
        return Guess(tuple(tokens), tuple(parents), tuple(kinds), tuple(beliefs)) if tokens else NO_GUESS

    def observe(self, seen: SequenceOf[Seen]) -> None:
        if not self._max_tables:
            return
        few: list[tuple[Seen, list[int]]] = []
        for one, rows in self._pick([one for one in seen if one.drawn and one.logits is not None]):
            if len(rows) < FEW_ROWS:
                few.append((one, rows))
            else:
                self._learn(one, rows, self._largest(_rows(one, rows)))
        if not few:
            return
        found = self._largest(torch.cat([_rows(one, rows) for one, rows in few]))
        begin = 0
        for one, rows in few:
            self._learn(one, rows, found[begin : begin + len(rows)])
            begin += len(rows)

    def _pick(self, told: list[Seen]) -> list[tuple[Seen, list[int]]]:
        """Of each which of its drawn rows to look at: `MAX_ROWS` in all, those of paths that stood before
        others, and where there are more of them, of sequences in turn."""
        turn = self._turn % max(1, len(told))
        self._turn += MAX_ROWS
        told = told[turn:] + told[:turn]
        left = MAX_ROWS
        paths = [[0, *(draft + 1 for draft in one.kept)] for one in told]
        for path in paths:
            del path[left:]
            left -= len(path)
        picked: list[tuple[Seen, list[int]]] = []
        for one, path in zip(told, paths, strict=True):
            others = [row for row in range(len(one.drawn)) if row not in path][:left]
            left -= len(others)
            if path or others:
                picked.append((one, sorted(path + others)))
        return picked

    def release(self, sequence: Sequence) -> None:
        """What was learned of it stays."""

    def _largest(self, logits: torch.Tensor) -> NDArray[np.int32]:
        """logits [R, V] -> [R, CANDIDATES]"""
        return largest(logits, self._width).cpu().numpy().astype(np.int32)

    def _learn(self, one: Seen, rows: list[int], found: NDArray[np.int32]) -> None:
        """found [rows, CANDIDATES]; of two rows about the same token the first one counts."""
        computed = one.tokens[len(one.tokens) - len(one.drawn) :]
        about, found = [computed[row] for row in reversed(rows)], found[::-1]
        tokens, times = self._table(one.sequence.request.cache_salt)
        before = times[about]
        again = (before > 0) & (tokens[about, 0] == found[:, 0])
        times[about] = np.where(again, np.minimum(before + 1, STEADY), 1)
        tokens[about] = found

    def _table(self, salt: str) -> _Table:
        found = self._tables.get(salt)
        if found is None:
            if len(self._tables) >= self._max_tables:
                self._tables.popitem(last=False)
            shape = (self._vocab_size, self._width)
            found = _Table(np.zeros(shape, dtype=np.int32), np.zeros(self._vocab_size, dtype=np.uint8))
            self._tables[salt] = found
        self._tables.move_to_end(salt)
        return found


def _rows(one: Seen, rows: list[int]) -> torch.Tensor:
    """-> float32 [rows, V], without copying them where they are all there are."""
    assert one.logits is not None
    return one.logits if len(rows) == len(one.logits) else one.logits[rows]


def _kind(rank: int, depth: int, times: int) -> int:
    return (times - 1) * 6 + min(rank, 2) * 2 + min(depth, 1)


def largest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """logits [R, V] -> int64 [R, count], the places of the largest, in their order.

    They lie in the chunks with the largest peaks, which are found several times faster than by `topk` over
    the row.
    """
    size = logits.shape[1]
    whole = size // CHUNK * CHUNK
    if whole <= count * CHUNK:
        return logits.topk(count, -1).indices
    chunks = logits[:, :whole].reshape(len(logits), -1, CHUNK)
    peaks = chunks.amax(-1).topk(count, -1).indices[..., None]
    steps = torch.arange(CHUNK, device=logits.device)
    places = (peaks * CHUNK + steps).flatten(1)
    values = chunks.gather(1, peaks.expand(-1, -1, CHUNK)).flatten(1)
    if whole < size:
        rest = torch.arange(whole, size, device=logits.device).expand(len(logits), -1)
        places, values = torch.cat((places, rest), 1), torch.cat((values, logits[:, whole:]), 1)
    found: torch.Tensor = places.gather(1, values.topk(count, -1).indices)
    return found
