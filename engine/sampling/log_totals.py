"""The logarithm of a row's sum of exponentials, with the same bits whatever other rows there are."""

from __future__ import annotations

import torch


def log_totals(values: torch.Tensor) -> torch.Tensor:
    """values float32 [R, V] -> [R].

    Where rows are few `torch.logsumexp` shares one out among threads, and adds in another order; log_softmax
    leaves each row to one. At the peak it is minus what the sum adds to it.
    """
    return values.amax(-1) - torch.log_softmax(values, -1).amax(-1)
