"""Logits to tokens: argmax, or Gumbel-max with noise that depends on the place alone.

Rows are independent: a row's token is a function of its logits, its request's parameters and its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch

from engine.messages import TokenLogprobs
from engine.sampling.log_totals import log_totals
from engine.sampling.ranking import NOT_FINITE, RowError, contenders, is_random, processed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.sampling.places import Place

PIECE_BYTES: Final = 32 << 20  # of float32 logits that are worked on at a time; there are several copies

__all__ = ["NOT_FINITE", "PIECE_BYTES", "Drawn", "RowError", "logprobs_of", "rows_of_piece", "sample"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token of each row; those of rows in `errors` mean nothing."""

    tokens: list[int]
    errors: dict[int, RowError]

    def errors_of(self, first: int, count: int) -> dict[int, RowError]:
        """Those of `count` rows, numbered from 0."""
        if not self.errors:
            return {}
        return {row: self.errors[first + row] for row in range(count) if first + row in self.errors}


def rows_of_piece(vocab_size: int) -> int:
    """Rows of logits that are worked on at a time. A row's results do not depend on it."""
    return max(1, PIECE_BYTES // (4 * vocab_size))


def sample(logits: torch.Tensor, places: list[Place]) -> Drawn:
    """logits float32 [R, V], left as they are. Rows that need no draw have their likeliest token."""
    drawn = Drawn([], {})
    for rows in _pieces(places, rows_of_piece(logits.shape[-1])):
        piece = _sample(logits[rows], places[rows])
        drawn.tokens.extend(piece.tokens)
        drawn.errors.update((rows.start + row, error) for row, error in piece.errors.items())
    return drawn


def _pieces(places: list[Place], most: int) -> Iterator[slice]:
    """Of at most so many rows; those of one sequence, which may decide on each other, stay together."""
    if len(places) <= most:
        yield slice(0, len(places))
        return
    changes = [
        row for row, (one, other) in enumerate(pairwise(places), 1) if one.sequence is not other.sequence
    ]
    begin = 0
    for end, next_end in pairwise((*changes, len(places), len(places) + most)):
        if next_end - begin > most:
            yield slice(begin, end)
            begin = end


def _sample(logits: torch.Tensor, places: list[Place]) -> Drawn:
    values, _, tokens, errors = processed(logits, places)
    chosen: list[int] = tokens.tolist()
    random = [row for row, place in enumerate(places) if is_random(place) and row not in errors]
    following: dict[int, list[int]] = {}
    for row in random:
        if places[row].after:
            following.setdefault(row - places[row].after, []).append(row)
    needed = [row for row in random if not places[row].after]
    while needed:
        _draw(values, needed, places, chosen)
        needed = [
            row
            for before in needed
            for row in following.get(before, ())
            if places[row].drafted[-1] == chosen[before]
        ]
    return Drawn(chosen, errors)


def _draw(values: torch.Tensor, rows: list[int], places: list[Place], chosen: list[int]) -> None:
    """Puts the tokens of these rows into `chosen`."""
    for group in contenders(values, rows, places):
        drawn = group.tokens(group.noisy(places).argmax(-1, keepdim=True)).view(-1).tolist()
        for row, token in zip(group.rows, drawn, strict=True):
            chosen[row] = token


def logprobs_of(logits: torch.Tensor, tokens: list[int], count: int) -> list[TokenLogprobs]:
    """logits float32 [R, V] of the model itself, the token chosen in each row -> its and the `count` best.

    In pieces: each intermediate value is as large as they are.
    """
    found: list[TokenLogprobs] = []
    together = rows_of_piece(logits.shape[-1])
    for begin in range(0, len(tokens), together):
        rows = slice(begin, begin + together)
        found += _logprobs_of_rows(logits[rows], tokens[rows], count)
    return found


def _logprobs_of_rows(logits: torch.Tensor, tokens: list[int], count: int) -> list[TokenLogprobs]:
    totals = log_totals(logits)[:, None]
    index = torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    picked = logits.gather(-1, index)
    ranks = ((logits > picked).sum(-1) + 1).tolist()
    values = (picked - totals).view(-1).tolist()
    best = logits.topk(min(count, logits.shape[-1]), -1)
    tops = (best.values - totals).tolist()
    return [
        TokenLogprobs(token, value, rank, tuple(zip(ids, top, strict=True)))
        for token, value, rank, ids, top in zip(
            tokens, values, ranks, best.indices.tolist(), tops, strict=True
        )
    ]
