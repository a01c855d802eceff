"""Which layer sees how much, and which turns, as config.json says it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from engine.models.config import Layer, Rope
from engine.models.rotary_fields import read_rope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.models.fields import Fields

_KNOWN = ("full_attention", "sliding_attention")


def alike(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    return (Layer(rope=read_rope(fields, head_dim)),) * count


def all_windowed(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    return (Layer(rope=read_rope(fields, head_dim), window=_window_of(fields)),) * count


def phi3(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    rope = read_rope(fields, head_dim, partial=True)
    return (Layer(rope=rope, window=_window_of(fields)),) * count


def qwen(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    """The first `max_window_layers` see everything."""
    window = _windowed(fields)
    first = fields.count("max_window_layers", least=0) if window else count
    default = ["full_attention" if index < first else "sliding_attention" for index in range(count)]
    return _read_layers(read_rope(fields, head_dim), _kinds(fields, default), window)


def smollm3(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    rotated, window = _rotates(fields, count), _windowed(fields)
    default = ["sliding_attention" if window and not turns else "full_attention" for turns in rotated]
    layers = _read_layers(read_rope(fields, head_dim), _kinds(fields, default), window)
    return tuple(
        layer if turns else replace(layer, rope=None) for layer, turns in zip(layers, rotated, strict=True)
    )


def gemma2(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    window = _window_of(fields)
    return _read_layers(read_rope(fields, head_dim), _kinds(fields, _alternating(count, 2)), window)


def gemma3(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    """Local layers have a window and positions of their own, which are never stretched by `rope_scaling`."""
    found = _kinds(fields, _alternating(count, fields.count("sliding_window_pattern", 6)))
    window = _window_of(fields) if "sliding_attention" in found else 0
    everywhere = Layer(rope=read_rope(fields, head_dim, layer_type="full_attention"))
    local = Layer(rope=_gemma3_local_rope(fields, head_dim), window=window)
    return tuple(local if kind == "sliding_attention" else everywhere for kind in found)


def _gemma3_local_rope(fields: Fields, head_dim: int) -> Rope:
    theta = fields.number("rope_local_base_freq", 10000.0)
    written = fields.within("rope_parameters").values
    if "sliding_attention" not in written:
        return Rope(theta=theta, num_rotated=head_dim)
    own = replace(fields, values={**fields.values, "rope_theta": theta, "rope_scaling": None})
    return read_rope(own, head_dim, layer_type="sliding_attention")


def llama4(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    """Layers that rotate see a chunk, the others everything. Only where no layer has experts."""
    sparse = fields.values.get("moe_layers")
    step = fields.count("interleave_moe_layer_step", 1, least=0)
    experts = fields.count("num_local_experts", 16, least=0)
    if sparse is None:
        sparse = list(range(step - 1, count, step)) if step and experts else []
    if sparse:
        raise fields.unsupported("moe_layers", sparse, ": of Llama 4, models without experts are served")
    rotated = _rotates(fields, count)
    found = _kinds(
        fields,
        ["chunked_attention" if turns else "full_attention" for turns in rotated],
        known=("chunked_attention", "full_attention"),
    )
    rope = read_rope(fields, head_dim)
    chunk = fields.count("attention_chunk_size") if "chunked_attention" in found else 0
    return tuple(
        Layer(rope=rope if turns else None, chunk=chunk if kind == "chunked_attention" else 0)
        for turns, kind in zip(rotated, found, strict=True)
    )


def mixtral(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    return tuple(replace(layer, experts=True) for layer in all_windowed(fields, head_dim, count))


def qwen3_moe(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    """Every `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`."""
    dense = fields.values.get("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple) or not all(type(index) is int for index in dense):
        raise fields.unsupported("mlp_only_layers", dense)
    dense = frozenset(dense)
    step, window = fields.count("decoder_sparse_step", 1), _windowed(fields)
    layer = Layer(rope=read_rope(fields, head_dim), window=window)
    return tuple(
        replace(layer, experts=index not in dense and (index + 1) % step == 0) for index in range(count)
    )


def gpt_oss(fields: Fields, head_dim: int, count: int) -> tuple[Layer, ...]:
    rope, window = read_rope(fields, head_dim), _window_of(fields)
    layers = _read_layers(rope, _kinds(fields, _alternating(count, 2)), window)
    return tuple(replace(layer, experts=True) for layer in layers)


def _kinds(fields: Fields, default: Sequence[str], known: tuple[str, ...] = _KNOWN) -> tuple[str, ...]:
    """`layer_types`: one for each layer."""
    written = fields.items("layer_types", len(default), (str,))
    for kind in written or ():
        if kind not in known:
            raise fields.unsupported("layer_types", kind)
    return tuple(default if written is None else written)


def _alternating(count: int, period: int) -> list[str]:
    """Every `period`-th layer sees everything."""
    return ["full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(count)]


def _read_layers(rope: Rope, found: tuple[str, ...], window: int) -> tuple[Layer, ...]:
    everywhere, local = Layer(rope=rope), Layer(rope=rope, window=window)
    return tuple(local if kind == "sliding_attention" else everywhere for kind in found)


def _window_of(fields: Fields) -> int:
    """`sliding_window`, 0 where it is null."""
    return fields.count("sliding_window") if fields.has("sliding_window") else 0


def _windowed(fields: Fields) -> int:
    """`sliding_window` where `use_sliding_window` switches it on."""
    return _window_of(fields) if fields.flag("use_sliding_window") else 0


def _rotates(fields: Fields, count: int) -> tuple[bool, ...]:
    """`no_rope_layers` has 1 for the layers that do rotate."""
    if fields.values.get("no_rope_layers"):  # an empty list is as good as none
        return tuple(map(bool, fields.items("no_rope_layers", count, (int, bool)) or ()))
    interval = fields.count("no_rope_layer_interval", 4)
    return tuple((index + 1) % interval != 0 for index in range(count))
