"""A tiny model served from each type of GGUF's blocks, against the same numbers in F32; and broken files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoint import CheckpointError, locate
from engine.weights.dequantise import SUPPORTED
from engine.weights.loader import load_weights
from tests.engine.families.served import serve
from tests.engine.weights import gguf_bytes as make
from tests.engine.weights.test_dequantise import KINDS, SCALES_AT

VOCABULARY, HIDDEN, INNER = 64, 256, 512
METADATA = make.TINY_METADATA | {
    "llama.context_length": 64,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "tokenizer.ggml.tokens": tuple(f"<{token}>" for token in range(VOCABULARY)),
    "tokenizer.ggml.token_type": (1,) * VOCABULARY,
}
SHAPES = {
    "token_embd.weight": (VOCABULARY, HIDDEN),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN // 2, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN // 2, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate.weight": (INNER, HIDDEN),
    "blk.0.ffn_up.weight": (INNER, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, INNER),
}
NORMS = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def blocks(name: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Raw blocks of weights that are neither all alike nor large: uint8 [rows, bytes]."""
    if name in PLAIN:
        return rng.normal(0, 0.1, shape).astype(PLAIN[name]).view(np.uint8)
    if name == "BF16":
        return torch.from_numpy(rng.normal(0, 0.1, shape)).bfloat16().view(torch.uint8).numpy()
    kind = KINDS[name]
    count = shape[0] * shape[1] // kind.block_size
    raw = rng.integers(0, 256, (count, kind.block_bytes), dtype=np.uint8)
    for at in SCALES_AT[name]:
        raw[:, at : at + 2] = rng.uniform(1e-4, 2e-3, (count, 1)).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        raw[:, 0] = rng.integers(118, 123, count)
    return raw.reshape(shape[0], -1)


def write(path: Path, tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> Path:
    norms = {name: ((HIDDEN,), 0, np.ones(HIDDEN, np.float32).tobytes()) for name in NORMS}
    path.write_bytes(make.gguf(METADATA, norms | tensors))
    return path


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_model_of_each_type_is_served(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    kind = gguf.GGMLQuantizationType[name]
    quantised: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for tensor, shape in SHAPES.items():
        raw = blocks(name, shape, rng)
        quantised[tensor] = (shape, kind.value, raw.tobytes())
        if name == "F64":
            values = raw.view(np.float64).astype(np.float32)
        else:
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
        plain[tensor] = (shape, 0, np.ascontiguousarray(values, np.float32).tobytes())
    prompt = [[1, 5, 9, 2, 60, 33]]
    (ours,) = serve(write(tmp_path / "q.gguf", quantised), prompt, step_tokens=64, num_tokens=8)
    (expected,) = serve(write(tmp_path / "p.gguf", plain), prompt, step_tokens=64, num_tokens=8)
    assert ours.tokens == expected.tokens
    assert torch.equal(ours.logits, expected.logits)
    assert ours.logits.std() > 1e-3


TINY = make.gguf(
    make.TINY_METADATA,
    {
        name: (shape, 8, bytes(34 * shape[0] * shape[1] // 32)) if shape[1:] else (shape, 0, bytes(128))
        for name, shape in {
            "token_embd.weight": (4, 32), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,),
            "blk.0.ffn_norm.weight": (32,), "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32),
            "blk.0.attn_v.weight": (16, 32), "blk.0.attn_output.weight": (32, 32),
            "blk.0.ffn_gate.weight": (64, 32), "blk.0.ffn_up.weight": (64, 32),
            "blk.0.ffn_down.weight": (32, 64),
        }.items()
    },
)  # fmt: skip
HEADER_BYTES = TINY.index(bytes(200))


def outcome(path: Path) -> str:
    """What is wrong with the file; "" when it was loaded."""
    try:
        load_weights(locate(str(path)), torch.float32, torch.device("cpu"), 2**24)
    except CheckpointError as error:
        return str(error)
    return ""


def test_the_unbroken_file_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(TINY)
    assert not outcome(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, HEADER_BYTES),
    change=st.binary(min_size=1, max_size=8)
    | st.sampled_from([n.to_bytes(8, "little") for n in (0, 1, 2**31 - 1, 2**40, 2**63, 2**64 - 1)]),
    cut=st.none() | st.integers(0, len(TINY)),
)
def test_a_changed_file_is_loaded_or_refused_in_one_line(
    tmp_path: Path, at: int, change: bytes, cut: int | None
) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes((TINY[:at] + change + TINY[at + len(change) :])[:cut])
    assert "\n" not in outcome(path)
