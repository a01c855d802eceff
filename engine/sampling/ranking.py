"""What tokens are ranked by where one is drawn: logits as the request wants them, and the noise of the place.

The draw takes the best of this ranking; whoever wants to know what the draw would take ranks alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.noise import NoiseKeys
from engine.sampling.largest import largest
from engine.sampling.log_totals import log_totals
from engine.sampling.processors import BANNED, MaskFailed
from engine.sampling.truncation import CANDIDATES, threshold, truncates, typical_mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.sampling.places import Place

NOT_FINITE = "the model's logits are not finite"
GREEDY_BELOW = 1e-5  # dividing by less would leave the range of float32


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no token. `refused`: its request asked for the impossible."""

    cause: str
    refused: bool = False


class Processed(NamedTuple):
    """Rows as their requests want them, before temperature: values float32 [R, V]; the greatest of each and
    its token, [R]. What stands in rows with an error means nothing. `values` may be the logits themselves.
    """

    values: torch.Tensor
    peaks: torch.Tensor
    tokens: torch.Tensor
    errors: dict[int, RowError]


class Contenders(NamedTuple):
    """Who may be drawn in some rows: values float32 [len(rows), K], after the temperature; ids int64
    [len(rows), K], or None where entry t is token t. Who was cut from the draw is not there or has -inf."""

    rows: list[int]
    values: torch.Tensor
    ids: torch.Tensor | None

    def tokens(self, entries: torch.Tensor) -> torch.Tensor:
        """entries int64 [len(rows), n] of the contenders -> their tokens"""
        return entries if self.ids is None else self.ids.gather(-1, entries)

    def noisy(self, places: list[Place]) -> torch.Tensor:
        """float32 [len(rows), K]: the greatest of a row is drawn; places are those of all rows."""
        among = [places[row] for row in self.rows]
        noise = NoiseKeys(
            [place.params.seed for place in among],
            [place.sequence.index for place in among],
            [place.number for place in among],
            self.values.device,
        )
        if self.ids is None:
            return self.values + noise.of_vocabulary(self.values.shape[1])
        return self.values + noise.of_tokens(self.ids)


def processed(logits: torch.Tensor, places: list[Place]) -> Processed:
    """logits float32 [R, V], left as they are. What fails in one row stays in that row."""
    values, errors = _changed(logits, places)
    peaks, tokens = largest(values)
    if not bool(torch.isfinite(peaks).all()):
        errors = _errors(logits, peaks) | errors
    return Processed(values, peaks, tokens, errors)


def is_random(place: Place) -> bool:
    return place.params.temperature > GREEDY_BELOW


def contenders(values: torch.Tensor, rows: list[int], places: list[Place]) -> Iterator[Contenders]:
    """Of rows of processed values with a finite peak, for a draw at temperatures above 0: each row is in one
    result."""
    temperatures = torch.tensor([places[row].params.temperature for row in rows], device=values.device)
    scaled = values[rows] / temperatures[:, None]
    for group in _groups(scaled, [places[row] for row in rows]):
        yield group._replace(rows=[rows[index] for index in group.rows])


def _changed(logits: torch.Tensor, places: list[Place]) -> tuple[torch.Tensor, dict[int, RowError]]:
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
        except MaskFailed as failure:
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


def _groups(scaled: torch.Tensor, places: list[Place]) -> Iterator[Contenders]:
    """scaled float32 [R, V], after the temperature; may be changed."""
    cut = [row for row, place in enumerate(places) if truncates(place.params)]
    whole = [row for row in range(len(places)) if row not in set(cut)]
    if cut:
        for row in cut:
            if places[row].params.typical_p < 1.0:
                scaled[row].masked_fill_(~typical_mask(scaled[row], places[row].params.typical_p), BANNED)
        found, unfinished = _among_largest(scaled, cut, places)
        if found is not None:
            yield found
        for row in unfinished:
            ordered = scaled[row].sort(descending=True).values
            lowest = threshold(ordered, float(log_totals(scaled[row : row + 1])), places[row].params)
            kept = torch.nonzero(scaled[row] >= lowest).view(1, -1)
            yield Contenders([row], scaled[row][kept], kept)
    if whole:
        yield Contenders(whole, scaled[whole], None)


def _among_largest(
    scaled: torch.Tensor, rows: list[int], places: list[Place]
) -> tuple[Contenders | None, list[int]]:
    """Those whose largest values hold everything kept, and the rows that need all of theirs."""
    part = scaled[rows]
    best, ids = part.topk(min(CANDIDATES, part.shape[1]), -1)
    totals = log_totals(part).tolist()
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
        return None, unfinished
    return Contenders([rows[index] for index in complete], best[complete], ids[complete]), unfinished


def _crowded(best: torch.Tensor, top_k: int) -> bool:
    """Whether top_k, ties included, may reach past the candidates."""
    return top_k > 0 and (top_k >= len(best) or float(best[top_k - 1]) <= float(best[-1]))
