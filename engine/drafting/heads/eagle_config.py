"""What config.json says of EAGLE heads, in the spellings of the projects that publish them. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.models.config import QKNorm
from engine.models.families import from_config_json
from engine.models.fields import Fields
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from engine.models.config import TransformerConfig

_WINDOWS = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")
_MAX_TAPS = 16


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """What is beside `layers` is of EAGLE-3."""

    layers: TransformerConfig
    residual_is_normed: bool
    passes_normed: bool
    norm_before_fuse: bool  # one of all taps side by side
    norm_each_tap: bool


def read_config(
    folder: Path,
    config_json: Mapping[str, Any],
    target: TransformerConfig,
    names: Collection[str],
    layer: str,
) -> EagleConfig:
    """`layer`: what stands before the names of the first layer's parts. Raises CheckpointError."""
    fields = Fields(f"{folder}: config.json", config_json)
    speculators = fields.has("transformer_layer_config")
    own = fields.within("transformer_layer_config") if speculators else fields
    nested = fields.within("eagle_config")
    _check(fields, nested)
    hidden = fields.count("target_hidden_size", own.count("hidden_size"))
    for name, has, needed in (
        ("hidden_size", hidden, target.hidden_size),
        ("vocab_size", own.count("vocab_size", target.vocab_size), target.vocab_size),
    ):
        if has != needed:
            raise CheckpointError(
                f"{folder}: the head is for a model with {name} = {has}, this one has {needed}: take one "
                f"that was trained for this model"
            )
    return EagleConfig(
        layers=_layers(folder, own, target, names, layer),
        residual_is_normed=fields.flag("norm_before_residual", speculators),
        passes_normed=fields.flag("norm_output", nested.flag("norm_output")),
        norm_before_fuse=fields.flag("norm_before_fc", nested.flag("norm_before_fc")),
        norm_each_tap=fields.flag("fc_norm", nested.flag("fc_norm")),
    )


def _check(fields: Fields, nested: Fields) -> None:
    """Fields of which one value is what is computed here."""
    fields.check("layernorms", False)
    fields.check("logit_scale", 1.0)
    nested.check("use_input_layernorm_in_first_layer", True)
    nested.check("use_last_layernorm", True)
    nested.check("use_mtp_layernorm", False)
    nested.check("parallel_draft_step", 1)


def _layers(
    folder: Path, own: Fields, target: TransformerConfig, names: Collection[str], layer: str
) -> TransformerConfig:
    """Layers like Llama's; biases and norms of queries and keys are there where they are stored."""
    plain = {name: value for name, value in own.values.items() if name not in _WINDOWS}
    common = {"vocab_size": target.vocab_size, "architectures": ["LlamaForCausalLM"]}
    try:
        config = from_config_json(plain | common)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    kinds = own.items("layer_types", config.num_layers, (str,)) or ()
    window = own.count("sliding_window") if "sliding_attention" in kinds else 0
    windows = [window if kind == "sliding_attention" else 0 for kind in kinds] or [0] * config.num_layers
    return replace(
        config,
        layers=tuple(replace(one, window=span) for one, span in zip(config.layers, windows, strict=True)),
        qkv_bias=f"{layer}self_attn.q_proj.bias" in names,
        out_bias=f"{layer}self_attn.o_proj.bias" in names,
        mlp_bias=f"{layer}mlp.down_proj.bias" in names,
        qk_norm=QKNorm.HEAD if f"{layer}self_attn.q_norm.weight" in names else QKNorm.NONE,
    )


def read_taps(folder: Path, config_json: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Of EAGLE-3: layers of the target whose input is read; none: it reads what the target's head reads.
    Raises CheckpointError.

    Beside the other fields an id names the layer whose input is read (vLLM, speculators); within
    `eagle_config` the one whose output is (SGLang, ModelOpt). In whatever order they are written, the states
    lie in that of the layers.
    """
    fields = Fields(f"{folder}: config.json", config_json)
    nested = fields.within("eagle_config")
    if not nested.flag("use_aux_hidden_state", True):
        return ()
    name = "eagle_aux_hidden_state_layer_ids"
    place, shift = (fields, 0) if fields.values.get(name) or not nested.values.get(name) else (nested, 1)
    written = place.values.get(name)
    if not written:
        if num_layers < 5:
            raise CheckpointError(
                f"{fields.source} lacks {name}, and of {num_layers} layers there are none of the usual ones"
            )
        return (2, num_layers // 2, num_layers - 3)
    if not isinstance(written, list | tuple) or len(written) > _MAX_TAPS:
        raise place.unsupported(name, written)
    taps = tuple(sorted(one + shift if type(one) is int else -1 for one in written))
    if not all(0 <= tap <= num_layers for tap in taps):
        raise place.unsupported(name, written, f": the model has {num_layers} layers")
    return taps
