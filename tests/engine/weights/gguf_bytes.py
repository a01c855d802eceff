"""Small GGUF files, byte by byte, so that a test may break any of them."""

from __future__ import annotations

import struct
from typing import Any

U32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """Type and value, as metadata has them."""
    if isinstance(item, bool):
        return struct.pack("<IB", BOOL, item)
    if isinstance(item, int):
        return struct.pack("<II", U32, item)
    if isinstance(item, float):
        return struct.pack("<If", FLOAT32, item)
    if isinstance(item, str):
        return struct.pack("<I", STRING) + text(item)
    kind = STRING if isinstance(item[0], str) else U32
    items = [text(one) if isinstance(one, str) else struct.pack("<I", one) for one in item]
    return struct.pack("<IIQ", ARRAY, kind, len(item)) + b"".join(items)


def gguf(
    metadata: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], int, bytes]], version: int = 3
) -> bytes:
    """`tensors`: name -> (shape in torch order, type, data)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    out += b"".join(text(key) + value(item) for key, item in metadata.items())
    offset, data = 0, b""
    for name, (shape, kind, raw) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += text(name) + sizes + struct.pack("<IQ", kind, offset)
        data += raw + bytes(-len(raw) % 32)
        offset = len(data)
    return out + bytes(-len(out) % 32) + data


TINY_METADATA = {
    "general.architecture": "llama",
    "general.alignment": 32,
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ("a", "b", "ab", "<end>"),
    "tokenizer.ggml.merges": ("a b",),
    "tokenizer.ggml.token_type": (1, 1, 1, 3),
    "tokenizer.ggml.eos_token_id": 3,
}
