"""A mixture of experts in plain torch: the definition that faster kernels are held against.

Rows of one expert are computed together, padded to a multiple of rows, and every row sums its experts in
the order of its own choice: so a row's result never depends on which rows chose the same expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from cuda_kernels.reference import ROW_MULTIPLE, gated, linear

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """E experts: gate_up [E, 2N, K] (gate first), down [E, K, N]; biases [E, 2N], [E, K] or none."""

    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


def route(logits: torch.Tensor, per_token: int, routing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """logits float32 [T, E] -> experts int64 and their weights float32, both [T, per_token], largest first.

    "softmax_all": softmax over all experts; "softmax_chosen": over the chosen ones (Mixtral, Jiang 2024).
    """
    if routing == "softmax_all":
        weights, chosen = logits.softmax(-1).topk(per_token, dim=-1)
        return chosen, weights
    assert routing == "softmax_chosen", f"a routing without a meaning: {routing}"
    best, chosen = logits.topk(per_token, dim=-1)
    return chosen, best.softmax(-1)


def experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, model: ExpertWeights, activation: str
) -> torch.Tensor:
    """x [T, K]; chosen, weights [T, k] as `route` gives them -> [T, K] in the dtype of x."""
    num_rows, per_token = chosen.shape
    order = chosen.flatten().argsort(stable=True)  # places (row, choice), by expert
    counts = torch.bincount(chosen.flatten(), minlength=len(model.gate_up)).tolist()
    gathered = x.index_select(0, order // per_token)
    computed = torch.empty(num_rows * per_token, x.shape[-1], dtype=x.dtype, device=x.device)
    for expert, rows in _runs(counts):
        computed[order[rows]] = _one_expert(gathered[rows], expert, model, activation)
    choices = computed.view(num_rows, per_token, -1).float() * weights[:, :, None]
    total = choices[:, 0]
    for choice in range(1, per_token):  # one by one: a sum's order may depend on its shape
        total = total + choices[:, choice]
    return total.to(x.dtype)


def _runs(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """The experts that somebody chose, and their rows of the sorted places."""
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(begin, begin + count)
        begin += count


def _one_expert(x: torch.Tensor, expert: int, model: ExpertWeights, activation: str) -> torch.Tensor:
    count = len(x)
    padded = F.pad(x, (0, 0, 0, -count % ROW_MULTIPLE))
    gate_up_bias = None if model.gate_up_bias is None else model.gate_up_bias[expert]
    down_bias = None if model.down_bias is None else model.down_bias[expert]
    inner = gated(linear(padded, model.gate_up[expert], gate_up_bias), activation)
    return linear(inner, model.down[expert], down_bias)[:count]
