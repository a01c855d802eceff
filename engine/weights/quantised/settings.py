"""How a folder's weights are quantised, from `quantization_config` of its config.json."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from engine.models.fields import Fields, unsupported
from engine.weights.errors import CheckpointError
from engine.weights.quantised.awq import awq_recipes
from engine.weights.quantised.fields import FIELD_BITS
from engine.weights.quantised.float4 import float4_recipes
from engine.weights.quantised.gptq import gptq_recipes
from engine.weights.quantised.mxfp4 import mxfp4_recipes
from engine.weights.quantised.packed_rows import packed_recipes
from engine.weights.quantised.scaled import scaled_recipes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from engine.weights.safetensors import StoredTensor
    from engine.weights.source import Recipe

    Recipes = dict[str, Callable[[], Recipe]]
    Maker = Callable[[Mapping[str, StoredTensor]], Recipes]

_PACKED, _SCALED = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
_FLOAT4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
_FORMATS = ("dense", "mixed-precision", _PACKED, *_SCALED, *_FLOAT4)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """`maker` finds the plain tensors among the stored ones. Which modules are quantised, the stored tensors
    say: lists of targets and exceptions are not needed."""

    name: str
    maker: Maker
    activations: bool = False  # made for products of quantised activations too, which are not computed here


def read_quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """`config`: that of config.json; None where it speaks of none. Raises CheckpointError."""
    values = _settings(config)
    if not values:
        return None
    fields = Fields("config.json", values, "quantization_config.")
    method = values.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise unsupported(
            "config.json quantization_config.quant_method",
            method,
            f"; supported are {', '.join(_METHODS)}: convert the model to one of these, or to plain weights",
        )
    return _METHODS[method](fields)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for name in ("quantization_config", "compression_config"):
            values = holder.get(name)
            if isinstance(values, dict):
                return values
            if values is not None:
                raise unsupported(f"config.json {name}", values)
    return None


def _compressed_tensors(fields: Fields) -> Quantisation:
    fields.check("format", *_FORMATS)
    fields.within("sparsity_config").check("format", "dense")
    if fields.within("transform_config").values.get("config_groups"):
        raise CheckpointError(
            "config.json quantization_config.transform_config is not supported: weights that are rotated"
        )
    widths: set[int] = set()
    activations = False
    groups = fields.within("config_groups")
    for name in groups.values:
        group = groups.within(name)
        group.check("format", *_FORMATS)
        weights = group.within("weights")
        widths.add(weights.count("num_bits", 8))
        activations |= bool(group.values.get("input_activations"))
    form = fields.values.get("format") or _PACKED
    return Quantisation(f"compressed-tensors {form}", partial(_compressed, fields, widths), activations)


def _compressed(fields: Fields, widths: set[int], stored: Mapping[str, StoredTensor]) -> Recipes:
    packed = packed_recipes(stored, widths)
    if packed and not widths <= set(FIELD_BITS):
        raise CheckpointError(
            f"config.json quantization_config: weights of {sorted(widths)} bits in words are not supported, "
            f"but of {', '.join(map(str, FIELD_BITS))}"
        )
    return packed | float4_recipes(stored) | scaled_recipes(stored, _compressed_block(fields))


def _compressed_block(fields: Fields) -> tuple[int, int] | None:
    groups = fields.within("config_groups")
    blocks = [_pair(groups.within(name).within("weights"), "block_structure") for name in groups.values]
    return next((block for block in blocks if block), None)


def _fp8(fields: Fields) -> Quantisation:
    block = _pair(fields, "weight_block_size")
    return Quantisation("fp8", partial(scaled_recipes, block=block), activations=True)


def _pair(fields: Fields, name: str) -> tuple[int, int] | None:
    sizes = fields.items(name, 2, (int,))
    if sizes is not None and not all(0 < size < 2**31 for size in sizes):
        raise fields.unsupported(name, list(sizes))
    return None if sizes is None else (sizes[0], sizes[1])


def _gptq(fields: Fields) -> Quantisation:
    bits = fields.count("bits")
    fields.check("bits", *FIELD_BITS)
    fields.check("pack_dtype", "int32")
    named = "checkpoint_format" if fields.has("checkpoint_format") else "format"
    fields.check(named, "gptq", "gptq_v2")
    less_one = fields.values.get(named) != "gptq_v2"
    maker = partial(gptq_recipes, bits=bits, group_size=_group_size(fields), zeros_less_one=less_one)
    return Quantisation(f"GPTQ {bits} bit", maker)


def _awq(fields: Fields) -> Quantisation:
    fields.check("bits", 4)
    fields.check("w_bit", 4)
    version = fields.values.get("version")
    if version is not None and str(version).lower() != "gemm":
        raise fields.unsupported("version", version, "; supported is gemm")
    fields.check("format", "gemm")
    fields.check("zero_point", True)
    return Quantisation("AWQ 4 bit", partial(awq_recipes, group_size=_group_size(fields)))


def _group_size(fields: Fields) -> int:
    name = "q_group_size" if fields.has("q_group_size") and not fields.has("group_size") else "group_size"
    size = fields.count(name, -1, least=-1)
    if size == 0:
        raise fields.unsupported(name, size)
    return size


def _mxfp4(_: Fields) -> Quantisation:
    return Quantisation("MXFP4", mxfp4_recipes)


_METHODS: Mapping[str, Callable[[Fields], Quantisation]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
}
