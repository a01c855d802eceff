"""Which tokens stay in the draw: top_k, top_p, min_p and typical_p, each as a threshold.

A threshold keeps ties, so the kept set is a function of the row alone, whether it was found among a few
hundred candidates or by sorting the whole row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from scheduler.types import SamplingParams

CANDIDATES = 256  # enough for nearly every nucleus; rows that need more are sorted whole


def truncates(params: SamplingParams) -> bool:
    return bool(params.top_k or params.top_p < 1.0 or params.min_p > 0.0 or params.typical_p < 1.0)


def threshold(best: torch.Tensor, log_total: float, params: SamplingParams) -> float:
    """The smallest kept value of a row.

    best: float32 [K], the row's largest values after the temperature, descending; log_total: logsumexp of
    the whole row. The result is meaningful when it is larger than best[-1], or when K is the whole row.
    top_k first, then top_p (Holtzman 2020) of what top_k left, then min_p (Nguyen 2024).
    """
    kept = best[best > float("-inf")]
    if params.top_k and params.top_k < len(kept):
        kept = kept[kept >= kept[params.top_k - 1]]
    lowest = float(kept[-1])
    if params.top_p < 1.0:
        weights = torch.exp(kept.double() - log_total)
        total = float(weights.sum()) if params.top_k else 1.0
        before = torch.cumsum(weights, 0) - weights
        last = max(int((before < params.top_p * total).sum()) - 1, 0)
        lowest = float(kept[last])
    elif not params.top_k:
        lowest = float("-inf")
    if params.min_p > 0.0:
        lowest = max(lowest, float(kept[0]) + math.log(params.min_p))
    return lowest


def typical_mask(row: torch.Tensor, mass: float) -> torch.Tensor:
    """row float32 [V] after the temperature -> bool [V], the locally typical set (Meister 2022)."""
    log_probs = torch.log_softmax(row, -1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs.nan_to_num(neginf=0.0)).sum()
    distance = (-log_probs - entropy).abs()
    order = torch.argsort(distance, stable=True)
    before = torch.cumsum(probs[order].double(), 0) - probs[order]
    last = max(int((before < mass).sum()) - 1, 0)
    return distance <= distance[order[last]]
