"""Blocks of quantised weights, as GGUF stores them, widened to plain tensors.

A block is a few bytes of scales and the packed integers of 32 or 256 weights. Every function of
`gguf_blocks` takes the raw blocks as uint8 [num_blocks, block_bytes] and returns float32 [num_blocks,
block_size], computed in float32 in the order of ggml's own reference, so that results are equal to the
last bit. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.weights.gguf_blocks import k_quants, simple, tables, ternary

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.weights.gguf import BlockType

_CHUNK_WEIGHTS = 2**20  # bounds the temporaries: a few times 4 MiB
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_BLOCKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": simple.q4_0,
    "Q4_1": simple.q4_1,
    "Q5_0": simple.q5_0,
    "Q5_1": simple.q5_1,
    "Q8_0": simple.q8_0,
    "Q2_K": k_quants.q2_k,
    "Q3_K": k_quants.q3_k,
    "Q4_K": k_quants.q4_k,
    "Q5_K": k_quants.q5_k,
    "Q6_K": k_quants.q6_k,
    "IQ4_NL": tables.iq4_nl,
    "IQ4_XS": tables.iq4_xs,
    "MXFP4": tables.mxfp4,
    "TQ1_0": ternary.tq1_0,
    "TQ2_0": ternary.tq2_0,
}
SUPPORTED = (*_PLAIN, *_BLOCKS)


def can_dequantise(kind: BlockType) -> bool:
    return kind.name in SUPPORTED


def dequantise(raw: torch.Tensor, kind: BlockType, out: torch.Tensor) -> None:
    """Widen `raw`, uint8 [num_blocks * block_bytes], into `out`, [num_weights] of any floating type.

    Both lie on one device. Raises KeyError for a type that `can_dequantise` denies.
    """
    if kind.name in _PLAIN:
        out.copy_(raw.view(_PLAIN[kind.name]))
        return
    widen = _BLOCKS[kind.name]
    blocks, rows = raw.view(-1, kind.block_bytes), out.view(-1, kind.block_size)
    step = _CHUNK_WEIGHTS // kind.block_size
    for start in range(0, blocks.shape[0], step):
        rows[start : start + step] = widen(blocks[start : start + step])
