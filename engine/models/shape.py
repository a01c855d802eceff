"""What the configurations of all families have in common: sizes, and one entry for each layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from engine.models.config import ScalingKind, TransformerConfig
from engine.models.rotary_fields import stretched_positions
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from engine.models.config import Layer, Rope
    from engine.models.fields import Fields

MAX_LAYERS = 1024
MAX_EXPERTS = 1024  # of a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of config.json, which goes by its `model_type` where none is named.

    `defaults` are its fields' values where they are absent; `fixed` maps a field to the values it may have
    (absent and null always pass). `layers` gives an entry for each of so many layers of heads of that size;
    `traits` what else makes this family differ. `nested` names the object within config.json that has the
    fields.
    """

    name: str
    architecture: str
    model_type: str  # what config.json calls it, with or without its architecture
    layers: Callable[[Fields, int, int], tuple[Layer, ...]]
    traits: Callable[[Fields], dict[str, Any]] = lambda fields: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    nested: str = ""


def read_shape(family: Family, fields: Fields) -> TransformerConfig:
    """Raises CheckpointError."""
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    head_dim = fields.count("head_dim", max(1, hidden_size // num_heads))
    layers = family.layers(fields, head_dim, layer_count(fields, "num_hidden_layers"))
    common = TransformerConfig(
        architecture=family.name,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        layers=layers,
        num_heads=num_heads,
        num_kv_heads=fields.count("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_positions=reach(fields.count("max_position_embeddings", 2048), layers),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    return replace(common, **family.traits(fields))


def layer_count(fields: Fields, name: str) -> int:
    """Bounded, because an entry is made for each layer."""
    count = fields.count(name)
    if count > MAX_LAYERS:
        raise fields.unsupported(name, count, f"; the limit is {MAX_LAYERS} layers")
    return count


def reach(max_positions: int, layers: tuple[Layer, ...]) -> int:
    """How many positions the layers tell apart."""
    ropes = {layer.rope for layer in layers if layer.rope is not None}
    return max((stretched_positions(max_positions, rope.scaling) for rope in ropes), default=max_positions)


def checked(config: TransformerConfig) -> TransformerConfig:
    """Refuses sizes that cannot belong to each other. Raises CheckpointError."""
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{config.num_heads} attention heads cannot share {config.num_kv_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"the head size {config.head_dim} is odd; rotary positions need pairs")
    experts = config.experts
    if experts is not None and experts.count > MAX_EXPERTS:
        raise CheckpointError(f"{experts.count} experts are too many; the limit is {MAX_EXPERTS}")
    if experts is not None and experts.per_token > experts.count:
        raise CheckpointError(f"{experts.per_token} experts per token of {experts.count} cannot be chosen")
    for rope in {layer.rope for layer in config.layers if layer.rope is not None}:
        _check_rope(rope)
    return config


def _check_rope(rope: Rope) -> None:
    """Numbers from which no frequencies follow."""
    scaling = rope.scaling
    if rope.theta <= 1:
        raise CheckpointError(f"the rotary base {rope.theta} is not above 1")
    if scaling is None:
        return
    if scaling.kind is ScalingKind.DYNAMIC and rope.num_rotated <= 2:
        raise CheckpointError(f"dynamic rotary scaling needs more than {rope.num_rotated} rotated numbers")
    if scaling.kind is ScalingKind.LLAMA3 and scaling.low_freq_factor > scaling.high_freq_factor:
        raise CheckpointError(
            f"low_freq_factor {scaling.low_freq_factor} is above high_freq_factor {scaling.high_freq_factor}"
        )
