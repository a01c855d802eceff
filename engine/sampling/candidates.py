"""What the target's draw would take, were these the target's logits: how a drafter chooses its tokens.

The draws are coupled: the same processing, temperature, truncation and noise at the same place. So the better
a drafter knows the target's logits, the surer it guesses the very token that the target draws, at any
temperature (Gumbel coupling; Daliri 2025).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.sampling.largest import largest_places
from engine.sampling.ranking import contenders, is_random, processed

if TYPE_CHECKING:
    from engine.sampling.places import Place


class Candidates(NamedTuple):
    """tokens int64 [R, count] that may be drawn, best first; chances float32 [R, count], of 0 .. 1.

    A chance is the softmax of what the ranking goes by: not a probability of the draw, which is certain once
    the noise is known, but how clearly the token leads. Entries of chance 0 cannot be drawn; their tokens lie
    within the vocabulary and mean nothing.
    """

    tokens: torch.Tensor
    chances: torch.Tensor


def candidates(logits: torch.Tensor, places: list[Place], count: int) -> Candidates:
    """logits float32 [R, V], left as they are; place r is where row r's token stands. Never raises: rows
    that are not finite or allow nothing have chances of 0. The first of each row is what `sample` draws."""
    values, _, best, errors = processed(logits, places)
    tokens = torch.zeros(len(places), count, dtype=torch.int64, device=logits.device)
    chances = torch.zeros(len(places), count, dtype=torch.float32, device=logits.device)
    if count < 1:
        return Candidates(tokens, chances)
    greedy = [row for row, place in enumerate(places) if not is_random(place)]
    random = [row for row, place in enumerate(places) if is_random(place) and row not in errors]
    if greedy:
        everyone = len(greedy) == len(places)
        found = _best(values if everyone else values[greedy], best if everyone else best[greedy], count)
        width = found.tokens.shape[1]
        tokens[greedy, :width], chances[greedy, :width] = found
    if random:
        for group in contenders(values, random, places):
            noisy = group.noisy(places)
            found = _best(noisy, noisy.argmax(-1), count)
            width = found.tokens.shape[1]
            tokens[group.rows, :width], chances[group.rows, :width] = (
                group.tokens(found.tokens),
                found.chances,
            )
    chances[list(errors)] = 0.0
    return Candidates(tokens, chances)


def _best(values: torch.Tensor, first: torch.Tensor, count: int) -> Candidates:
    """values float32 [R, K]; first int64 [R], the entry that is drawn -> entries of at most K of the best."""
    entries = first[:, None]
    if count > 1:
        entries = largest_places(values, count)
        _lead(entries, first)
    totals = values.logsumexp(-1, keepdim=True)
    return Candidates(entries, (values.gather(-1, entries) - totals).exp_().nan_to_num_(0.0, 0.0, 0.0))


def _lead(entries: torch.Tensor, first: torch.Tensor) -> None:
    """Brings `first` to the front, in place: among equal values the two may choose differently."""
    wrong = torch.nonzero(entries[:, 0] != first).view(-1).tolist()
    for row in wrong:
        drawn = first[row]
        entries[row] = torch.where(entries[row] == drawn, entries[row, 0].clone(), entries[row])
        entries[row, 0] = drawn
