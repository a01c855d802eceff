"""Widened blocks are equal, bit for bit, to those of the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from engine.weights.dequantise import SUPPORTED, dequantise
from engine.weights.gguf import BLOCK_TYPES, BlockType

KINDS = {kind.name: kind for kind in BLOCK_TYPES.values()}
# Where the float16 numbers of a block lie, whose exponents are kept away from infinity and NaN.
SCALES_AT = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82)}
SCALES_AT |= {"Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
SCALES_AT |= {
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "MXFP4": (),
    "F16": (0,),
    "BF16": (0,),
    "F32": (2,),
    "F64": (6,),
}


def random_blocks(name: str, num_blocks: int) -> np.ndarray:
    """Any bytes are blocks. The first and last ones are edges: nothing but zeros, nothing but ones."""
    raw = np.random.default_rng(7).integers(0, 256, (num_blocks, KINDS[name].block_bytes), dtype=np.uint8)
    raw[0], raw[-1] = 0, 255
    for at in SCALES_AT[name]:
        raw[:, at + 1] &= 0xBF  # clears the top bit of the exponent
    if name == "MXFP4":
        raw[:, 0] = np.arange(num_blocks) % 253  # 8 more would be beyond what float32 can say
    return raw


def widened(raw: np.ndarray, kind: BlockType, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(raw.shape[0] * kind.block_size, dtype=dtype)
    dequantise(torch.from_numpy(raw).view(-1), kind, out)
    return out


@pytest.mark.parametrize("name", SUPPORTED)
def test_equals_the_reference(name: str) -> None:
    kind = KINDS[name]
    raw = random_blocks(name, 2**20 // kind.block_size + 3 if name in ("Q4_1", "Q6_K") else 600)
    if name == "F64":
        expected = raw.reshape(-1).view(np.float64).astype(np.float32)
    else:
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(-1)
    assert np.isfinite(expected).all()
    got = widened(raw, kind, torch.float32)
    assert torch.equal(got.view(torch.int32), torch.from_numpy(expected.copy()).view(torch.int32))
    if name != "F64":  # which is rounded once, not by way of float32
        assert torch.equal(widened(raw, kind, torch.bfloat16), got.to(torch.bfloat16))


def test_every_type_of_the_reference_is_there_or_refused_on_purpose() -> None:
    of_grids = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}
    # NVFP4 has a second scale, which lies in another tensor.
    known = {kind.name for kind in gguf.quants._type_traits}
    assert known - set(SUPPORTED) == of_grids | {"NVFP4"}


@pytest.mark.parametrize("code", BLOCK_TYPES)
def test_sizes_of_blocks_are_those_of_the_reference(code: int) -> None:
    known = BLOCK_TYPES[code]
    reference = gguf.GGMLQuantizationType(code)
    assert reference.name == known.name
    assert gguf.GGML_QUANT_SIZES[reference] == (known.block_size, known.block_bytes)


def test_every_code_of_the_reference_has_a_name_here() -> None:
    assert {kind.value for kind in gguf.GGMLQuantizationType} == set(BLOCK_TYPES)
