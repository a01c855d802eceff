"""The layers of each family in GGUF files. What a file does not say follows from its architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from engine.models.config import Layer, Rope
from engine.models.fields import decimal

if TYPE_CHECKING:
    from engine.models.gguf_header import Header

_LLAMA4_CHUNK, _LLAMA4_PERIOD = 8192, 4
_SMOLLM3_PERIOD = 4


def alike(header: Header) -> tuple[Layer, ...]:
    return (Layer(rope=header.rope()),) * header.num_layers


def llama(header: Header) -> tuple[Layer, ...]:
    """Mistral and Mixtral go by this name too."""
    return all_experts(header) if header.has_experts else alike(header)


def all_experts(header: Header) -> tuple[Layer, ...]:
    return _with_experts(header, alike(header))


def _with_experts(header: Header, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple(
        replace(layer, experts=f"blk.{index}.ffn_gate_inp.weight" in header.tensors)
        for index, layer in enumerate(layers)
    )


def smollm3(header: Header) -> tuple[Layer, ...]:
    rope = header.rope()
    return tuple(
        Layer(rope=rope if (index + 1) % _SMOLLM3_PERIOD else None) for index in range(header.num_layers)
    )


def phi3(header: Header) -> tuple[Layer, ...]:
    return (Layer(rope=header.rope(partial=True), window=header.window()),) * header.num_layers


def gemma2(header: Header) -> tuple[Layer, ...]:
    rope, window = header.rope(), header.window(4096)
    return tuple(Layer(rope=rope, window=window if local else 0) for local in header.local(2))


def gemma3(header: Header) -> tuple[Layer, ...]:
    """Local layers have positions of their own, which are not stretched."""
    window, everywhere = header.window(), Layer(rope=header.rope())
    theta = decimal(header.fields.number("rope.freq_base_swa", 10000.0))
    local_layer = Layer(rope=Rope(theta=theta, num_rotated=header.head_dim), window=window)
    if not window:
        return (everywhere,) * header.num_layers
    return tuple(local_layer if local else everywhere for local in header.local(6))


def gpt_oss(header: Header) -> tuple[Layer, ...]:
    rope, window = header.rope(truncate=False), header.window()
    layers = tuple(Layer(rope=rope, window=window if local else 0) for local in header.local(2))
    return _with_experts(header, layers)


def llama4(header: Header) -> tuple[Layer, ...]:
    if any(name.endswith("ffn_gate_inp.weight") for name in header.tensors):
        count = header.fields.values.get("expert_count")
        raise header.fields.unsupported(
            "expert_count", count, ": of Llama 4, models without experts are served"
        )
    rope = header.rope()
    if header.llama4_without_chunks:
        return (Layer(rope=rope),) * header.num_layers
    rotated = [(index + 1) % _LLAMA4_PERIOD != 0 for index in range(header.num_layers)]
    local = header.local(_LLAMA4_PERIOD)
    return tuple(
        Layer(rope=rope if turns else None, chunk=_LLAMA4_CHUNK if chunked else 0)
        for turns, chunked in zip(rotated, local, strict=True)
    )
