"""Which published configurations are which transformer. No torch here.

A family is data: the names it goes by, and the fields whose one supported value is assumed by the
arithmetic. A field that would change the arithmetic is refused by its name; one that would not (sizes
of initialisers, training switches) is ignored, as Hugging Face's own models ignore it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.models.config import RopeScaling, TransformerConfig
from engine.weights.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Family:
    """`fixed` maps a field of config.json to the values it may have; absent and null always pass."""

    name: str
    architecture: str  # in config.json
    gguf_architecture: str
    fixed: Mapping[str, tuple[object, ...]]


FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        gguf_architecture="llama",
        fixed={
            "hidden_act": ("silu",),
            "quantization_config": (),
            "sliding_window": (),
            "partial_rotary_factor": (1, 1.0),
            "is_encoder_decoder": (False,),
        },
    ),
)

# Keys under "<architecture>." of a GGUF file that are read, or that change nothing.
_GGUF_KEYS = frozenset(
    {
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
        "tensor_data_layout", "attention.head_count", "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
        "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned",
    }
)  # fmt: skip


def from_config_json(config: Mapping[str, Any]) -> TransformerConfig:
    """The transformer that a parsed config.json describes. Raises CheckpointError."""
    family = _family_of(config)
    for name, allowed in family.fixed.items():
        _check_fixed(config, name, allowed)
    fields = _Fields("config.json", config)
    rotary = _Fields("config.json rope_parameters", _mapping(config, "rope_parameters"))
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    default_theta = fields.number("rope_theta", 10000.0)
    return _checked(
        TransformerConfig(
            architecture=family.name,
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size"),
            num_layers=fields.count("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.count("num_key_value_heads", num_heads),
            head_dim=fields.count("head_dim", hidden_size // num_heads),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rotary.number("rope_theta", default_theta),
            max_positions=fields.count("max_position_embeddings", 2048),
            rope_scaling=_rope_scaling(config),
            tie_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
        )
    )


def from_gguf(metadata: Mapping[str, Any], rope_factors: tuple[float, ...] = ()) -> TransformerConfig:
    """The transformer that GGUF metadata describes. Raises CheckpointError.

    `rope_factors` are the values of the tensor `rope_freqs.weight`, by which Llama 3.1 files say how
    each rotary frequency is stretched. What only the tensors say (a head of its own, biases) is left
    at its default: see `engine.checkpoint`.
    """
    architecture = metadata.get("general.architecture")
    family = next((known for known in FAMILIES if known.gguf_architecture == architecture), None)
    if family is None:
        raise _unsupported("metadata general.architecture", architecture)
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key, value in own.items():
        if key not in _GGUF_KEYS and value:
            raise _unsupported(f"metadata {prefix}{key}", value)
    fields = _Fields(f"metadata {prefix[:-1]}", own)
    hidden_size, num_heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        _check_fixed(own, key, (head_dim,), prefix)
    scaling = _gguf_linear_scaling(own, prefix) or _llama3_scaling(own, rope_factors, head_dim)
    return _checked(
        TransformerConfig(
            architecture=family.name,
            vocab_size=_gguf_vocab_size(metadata, fields),
            hidden_size=hidden_size,
            intermediate_size=fields.count("feed_forward_length"),
            num_layers=fields.count("block_count"),
            num_heads=num_heads,
            num_kv_heads=fields.count("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=_decimal(fields.number("attention.layer_norm_rms_epsilon")),
            rope_theta=_decimal(fields.number("rope.freq_base", 10000.0)),
            max_positions=fields.count("context_length"),
            rope_scaling=scaling,
        )
    )


def _family_of(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures")
    for family in FAMILIES:
        if architectures == [family.architecture]:
            return family
    raise _unsupported("config.json architectures", architectures)


def _checked(config: TransformerConfig) -> TransformerConfig:
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{config.num_heads} attention heads cannot share {config.num_kv_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"the head size {config.head_dim} is odd; rotary positions need pairs")
    return config


def _rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """Either spelling: `rope_scaling` beside `rope_theta`, or both within `rope_parameters`."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    raw = _mapping(config, name)
    kind = raw.get("rope_type", raw.get("type", "default"))
    fields = _Fields(f"config.json {name}", raw)
    _check_fixed(raw, "partial_rotary_factor", (1, 1.0), f"{name}.")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=fields.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_positions=fields.count("original_max_position_embeddings"),
        )
    raise _unsupported(f"config.json {name}.rope_type", kind)


def _gguf_linear_scaling(own: Mapping[str, Any], prefix: str) -> RopeScaling | None:
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise _unsupported(f"metadata {prefix}rope.scaling.type", kind)
    return RopeScaling(kind="linear", factor=_Fields("metadata", own).number("rope.scaling.factor"))


def _llama3_scaling(own: Mapping[str, Any], factors: tuple[float, ...], head_dim: int) -> RopeScaling | None:
    """The factors of Llama 3.1 and later, recognised by their values: the file has nothing else."""
    if not factors:
        return None
    base = _Fields("metadata", own).number("rope.freq_base", 10000.0)
    scaling = RopeScaling(
        kind="llama3", factor=max(factors), low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_positions=8192,
    )  # fmt: skip
    expected = [_llama3_factor(scaling, base ** (-2 * i / head_dim)) for i in range(head_dim // 2)]
    if len(factors) != len(expected) or not all(map(_close, factors, expected)):
        raise _unsupported("tensor rope_freqs.weight", "factors that are not those of Llama 3.1")
    return scaling


def _llama3_factor(scaling: RopeScaling, frequency: float) -> float:
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = min(max((turns - low) / (high - low), 0.0), 1.0)
    return 1.0 / (keep + (1.0 - keep) / scaling.factor)


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-3)


def _gguf_vocab_size(metadata: Mapping[str, Any], fields: _Fields) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, tuple) and tokens else fields.count("vocab_size")


def _decimal(value: float) -> float:
    """GGUF keeps 32 bits; 9.99999974e-06 was written for 1e-05."""
    return float(f"{value:.7g}")


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed reading: a wrong value is an error that names `source`, the field and the value."""

    source: str
    values: Mapping[str, Any]

    def count(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise _unsupported(f"{self.source} {name}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise _unsupported(f"{self.source} {name}", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._get(name, False)
        if type(value) is not bool:
            raise _unsupported(f"{self.source} {name}", value)
        return value

    def _get(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.source} lacks {name}")
        return default if value is None else value


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise _unsupported(f"config.json {name}", value)
    return value


def _check_fixed(values: Mapping[str, Any], name: str, allowed: tuple[object, ...], prefix: str = "") -> None:
    value = values.get(name)
    if value is not None and value not in allowed:
        raise _unsupported(f"field {prefix}{name}", value)


def _unsupported(name: str, value: object) -> CheckpointError:
    shown = repr(value)
    return CheckpointError(f"{name} = {shown if len(shown) <= 80 else shown[:77] + '...'} is not supported")
