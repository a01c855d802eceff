"""Logits to tokens: argmax, or Gumbel-max with noise that depends on the place alone.

Rows are independent: a row's token is a function of its logits, its request's parameters and its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.messages import TokenLogprobs
from engine.noise import NoiseKeys
from engine.sampling.processors import BANNED
from engine.sampling.truncation import CANDIDATES, threshold, truncates, typical_mask

if TYPE_CHECKING:
    from engine.sampling.places import Place

NOT_FINITE = "the model's logits are not finite"
SCORED_ROWS = 256
GREEDY_BELOW = 1e-5  # dividing by less would leave the range of float32


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no token. `refused`: its request asked for the impossible."""

    cause: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token of each row; those of rows in `errors` mean nothing."""

    tokens: list[int]
    errors: dict[int, RowError]


def sample(logits: torch.Tensor, places: list[Place]) -> Drawn:
    """logits float32 [R, V], left as they are."""
    values, errors = _processed(logits, places)
    peaks, tokens = values.max(-1)
    if not bool(torch.isfinite(peaks).all()):
        errors = _errors(logits, peaks) | errors
    random = [
        row
        for row, place in enumerate(places)
        if place.params.temperature > GREEDY_BELOW and row not in errors
    ]
    chosen: list[int] = tokens.tolist()
    if random:
        temperatures = torch.tensor([places[row].params.temperature for row in random], device=logits.device)
        scaled = values[random] / temperatures[:, None]
        for row, token in zip(random, _draw(scaled, [places[row] for row in random]), strict=True):
            chosen[row] = token
    return Drawn(chosen, errors)


def _processed(logits: torch.Tensor, places: list[Place]) -> tuple[torch.Tensor, dict[int, RowError]]:
    """What fails in one row stays in that row."""
    changed = [row for row, place in enumerate(places) if place.processor is not None]
    errors: dict[int, RowError] = {}
    if not changed:
        return logits, errors
    values = logits.clone()
    for row in changed:
        processor, drafted = places[row].processor, places[row].drafted
        assert processor is not None
        try:
            processor.apply(values[row], drafted)
        except (IndexError, RuntimeError, ValueError) as failure:
            errors[row] = RowError(f"the sampling parameters cannot be applied: {failure}", refused=True)
    return values, errors


def _errors(logits: torch.Tensor, peaks: torch.Tensor) -> dict[int, RowError]:
    """Rows without a finite peak: banned empty by their request, or broken before that."""
    rows: list[int] = torch.nonzero(~torch.isfinite(peaks)).view(-1).tolist()
    return {
        row: RowError("the parameters allow no token here", refused=True)
        if bool(torch.isfinite(logits[row].max()))
        else RowError(NOT_FINITE)
        for row in rows
    }


def _draw(scaled: torch.Tensor, places: list[Place]) -> list[int]:
    """scaled float32 [R, V], after the temperature; may be changed."""
    cut = [row for row, place in enumerate(places) if truncates(place.params)]
    tokens: dict[int, int] = {}
    whole = [row for row in range(len(places)) if row not in set(cut)]
    if cut:
        for row in cut:
            if places[row].params.typical_p < 1.0:
                scaled[row].masked_fill_(~typical_mask(scaled[row], places[row].params.typical_p), BANNED)
        tokens, unfinished = _draw_candidates(scaled, cut, places)
        for row in unfinished:
            ranked = scaled[row].sort(descending=True).values
            lowest = threshold(ranked, float(scaled[row].logsumexp(-1)), places[row].params)
            kept = torch.nonzero(scaled[row] >= lowest).view(1, -1)
            noisy = scaled[row][kept] + _keys([places[row]], scaled.device).of_tokens(kept)
            tokens[row] = int(kept[0, noisy.argmax()])
    if whole:
        noise = _keys([places[row] for row in whole], scaled.device).of_vocabulary(scaled.shape[1])
        found = (scaled[whole] + noise).argmax(-1).tolist()
        tokens.update(zip(whole, found, strict=True))
    return [tokens[row] for row in range(len(places))]


def _draw_candidates(
    scaled: torch.Tensor, rows: list[int], places: list[Place]
) -> tuple[dict[int, int], list[int]]:
    """Draw among the largest values where they hold everything kept; -> tokens, rows that need all."""
    part = scaled[rows]
    best, ids = part.topk(min(CANDIDATES, part.shape[1]), -1)
    totals = part.logsumexp(-1).tolist()
    complete: list[int] = []
    unfinished: list[int] = []
    for index, row in enumerate(rows):
        params = places[row].params
        if _crowded(best[index], params.top_k):
            unfinished.append(row)
            continue
        lowest = threshold(best[index], totals[index], params)
        if float(best[index, -1]) < lowest:
            best[index].masked_fill_(best[index] < lowest, BANNED)
            complete.append(index)
        else:
            unfinished.append(row)
    if not complete:
        return {}, unfinished
    keys = _keys([places[rows[index]] for index in complete], scaled.device)
    winners = (best[complete] + keys.of_tokens(ids[complete])).argmax(-1, keepdim=True)
    tokens = ids[complete].gather(-1, winners).view(-1).tolist()
    return {rows[index]: token for index, token in zip(complete, tokens, strict=True)}, unfinished


def _crowded(best: torch.Tensor, top_k: int) -> bool:
    """Whether top_k, ties included, may reach past the candidates."""
    return top_k > 0 and (top_k >= len(best) or float(best[top_k - 1]) <= float(best[-1]))


def _keys(places: list[Place], device: torch.device) -> NoiseKeys:
    return NoiseKeys(
        [place.params.seed for place in places],
        [place.sequence.index for place in places],
        [place.number for place in places],
        device,
    )


def logprobs_of(logits: torch.Tensor, tokens: list[int], count: int) -> list[TokenLogprobs]:
    """logits float32 [R, V] of the model itself, the token chosen in each row -> its and the `count` best.

    In pieces: a long prompt's rows are gigabytes, and each intermediate value is as large again.
    """
    found: list[TokenLogprobs] = []
    for begin in range(0, len(tokens), SCORED_ROWS):
        rows = slice(begin, begin + SCORED_ROWS)
        found += _logprobs_of_rows(logits[rows], tokens[rows], count)
    return found


def _logprobs_of_rows(logits: torch.Tensor, tokens: list[int], count: int) -> list[TokenLogprobs]:
    totals = logits.logsumexp(-1, keepdim=True)
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
