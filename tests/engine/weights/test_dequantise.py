"""Widened blocks are equal, bit for bit, to those of the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from engine.weights.dequantise import can_dequantise, dequantise
from engine.weights.gguf import BLOCK_TYPES

SUPPORTED = [kind for kind in BLOCK_TYPES.values() if can_dequantise(kind)]


def random_blocks(name: str, num_blocks: int) -> np.ndarray:
    """Any bytes are blocks; only the scales' exponents are kept away from infinity and NaN."""
    kind = next(kind for kind in SUPPORTED if kind.name == name)
    raw = np.random.default_rng(7).integers(0, 256, (num_blocks, kind.block_bytes), dtype=np.uint8)
    half_scales = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q6_K": (208,), "F16": (0,)}
    wide = {"BF16": (0,), "F32": (2,)}
    for at in wide.get(name, half_scales.get(name, (0, 2))):
        raw[:, at + 1] &= 0xBF  # clears the top bit of the exponent
    return raw


@pytest.mark.parametrize("name", [kind.name for kind in SUPPORTED])
def test_equals_the_reference(name: str) -> None:
    kind = next(kind for kind in SUPPORTED if kind.name == name)
    raw = random_blocks(name, 8200 if name.endswith("_0") else 600)  # more than one chunk for some
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(-1)
    got = dequantise(torch.from_numpy(raw).view(-1), kind, torch.float32)
    assert np.isfinite(expected).all()
    assert torch.equal(got, torch.from_numpy(np.ascontiguousarray(expected)))
    assert torch.equal(
        dequantise(torch.from_numpy(raw).view(-1), kind, torch.bfloat16), got.to(torch.bfloat16)
    )


def test_every_wanted_type_is_there() -> None:
    wanted = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}
    assert {kind.name for kind in SUPPORTED} == wanted


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
def test_sizes_of_blocks_are_those_of_the_reference(kind: object) -> None:
    code = next(code for code, known in BLOCK_TYPES.items() if known is kind)
    known = BLOCK_TYPES[code]
    reference = gguf.GGMLQuantizationType(code)
    assert reference.name == known.name
    assert gguf.GGML_QUANT_SIZES[reference] == (known.block_size, known.block_bytes)


def test_the_result_owns_its_memory() -> None:
    raw = torch.zeros(4, dtype=torch.uint8)
    assert dequantise(raw, BLOCK_TYPES[0], torch.float32).data_ptr() != raw.data_ptr()
