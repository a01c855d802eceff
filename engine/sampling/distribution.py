"""The probabilities that a token is drawn with, before the noise decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.sampling.ranking import contenders, is_random, processed

if TYPE_CHECKING:
    from engine.sampling.places import Place


def distribution(logits: torch.Tensor, place: Place) -> torch.Tensor | None:
    """logits float32 [V], left as they are -> float32 [V], summing to 1: processed, at the request's
    temperature, 0 for what is cut from the draw. Greedy requests: at temperature 1, nothing cut but the
    banned. None where no token can be drawn."""
    values, _, _, errors = processed(logits[None], [place])
    if errors:
        return None
    if not is_random(place):
        return torch.softmax(values[0], -1)
    [group] = contenders(values, [0], [place])
    probabilities = torch.softmax(group.values[0], -1)
    if group.ids is None:
        return probabilities
    return torch.zeros_like(values[0]).scatter_(0, group.ids[0], probabilities)
