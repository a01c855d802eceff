"""Every operation in plain torch: the definition that faster kernels are held against.

A row's result must not depend on what else is in the batch ("same seed, same text"). Matrix libraries
pick other loops for some small row counts, and those loops add in another order; at multiples of
`ROW_MULTIPLE` rows every row comes out bit for bit the same, so rows are padded to that. Where a processor
has AMX, oneDNN takes yet other loops for more than `AMX_ROWS` rows: so no more are computed at a time.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

ROW_MULTIPLE = 8
AMX_ROWS = 32
SWISH_LIMIT, SWISH_SLOPE = 7.0, 1.702  # of "clamped_swish"


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x [..., N], weight [N] or none (all ones) -> [..., N] in the dtype of x (Zhang and Sennrich 2019).

    With a weight of a wider dtype the product is taken in that one, and rounded once.
    """
    if weight is None or weight.dtype == x.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, eps).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]."""
    if x.shape[0] <= AMX_ROWS or x.dtype == torch.float32 or not x.is_cpu or not has_amx():
        return F.linear(x, weight, bias)
    blocks = (x[first : first + AMX_ROWS] for first in range(0, x.shape[0], AMX_ROWS))
    return torch.cat([F.linear(block, weight, bias) for block in blocks])


@functools.cache
def has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate_up [T, 2N], gate first -> activation(gate) * up [T, N] (GLU variants, Shazeer 2020).

    "silu", "gelu_tanh", or "clamped_swish" (GPT-OSS): gate sigmoid(1.702 gate) (up + 1), both clamped at 7.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    assert activation == "clamped_swish", f"an activation without a meaning: {activation}"
    gate, up = gate.clamp(max=SWISH_LIMIT), up.clamp(-SWISH_LIMIT, SWISH_LIMIT)
    return gate * torch.sigmoid(SWISH_SLOPE * gate) * (up + 1)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D]; cos, sin float32 [T, 1, R/2] -> float32 [T, H, D]; the first R numbers of each head turn,
    halves as pairs (RoFormer, Su 2021)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest.float()) if rest.shape[-1] else turned, dim=-1)


def write_kv(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> None:
    """Put new [n, Hkv, D] into cache [pages, Hkv, page_size, D] at flat (page, head, slot) rows [n * Hkv]."""
    cache.view(-1, cache.shape[-1]).index_copy_(0, rows, new.reshape(-1, new.shape[-1]).to(cache.dtype))
