"""The families as GGUF metadata describes them, as the converter of llama.cpp writes it. No torch here.

What a file does not say follows from its architecture, as llama.cpp has it; where llama.cpp itself leaves
something out that the model has (Phi-3's window), the model's own definition counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.models.config import (
    Activation,
    Experts,
    Layer,
    NormPlacement,
    QKNorm,
    Rope,
    TemperatureTuning,
    TransformerConfig,
)
from engine.models.fields import Fields, decimal
from engine.models.gguf_rotary import ROPE_KEYS, read_rope
from engine.models.shape import layer_count, reach

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

# Keys under "<architecture>." that every family reads, or that change nothing.
_KEYS = ROPE_KEYS | {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "tensor_data_layout", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
}  # fmt: skip
_EXPERT_KEYS = frozenset(
    {
        "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func",
        "expert_weights_norm",
    }
)  # fmt: skip
_WINDOW_KEYS = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
_SOFTMAX_GATING = (1, 3)  # over all experts, or over the chosen ones: the same once scaled to a sum of 1
_LLAMA4_CHUNK, _LLAMA4_PERIOD = 8192, 4
_LLAMA4_TUNING = TemperatureTuning(floor=8192, scale=0.1)
_SMOLLM3_PERIOD = 4
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62  # which scale attention by hidden size over heads


@dataclass(frozen=True, slots=True)
class Header:
    """What a family reads: the fields under its architecture, the tensors' names, the rotary factors."""

    fields: Fields
    tensors: Collection[str]
    factors: Mapping[str, tuple[float, ...]]
    head_dim: int
    num_layers: int

    def rope(self, *, partial: bool = False, truncate: bool = True) -> Rope:
        return read_rope(self.fields, self.head_dim, self.factors, partial=partial, truncate=truncate)

    def window(self, default: int = 0) -> int:
        return self.fields.count("attention.sliding_window", default, least=0)

    def local(self, period: int) -> tuple[bool, ...]:
        """Which layers have the window: the file says it by a list or a period, or the family does."""
        name, count = "attention.sliding_window_pattern", self.num_layers
        if isinstance(self.fields.values.get(name), tuple):
            return tuple(map(bool, self.fields.items(name, count, (bool, int)) or ()))
        period = self.fields.count(name, period)
        return tuple((index + 1) % period != 0 for index in range(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """`keys` are those that it reads beyond the common ones; any other must be absent or zero."""

    name: str
    architecture: str
    layers: Callable[[Header], tuple[Layer, ...]]
    traits: Callable[[Header], dict[str, Any]] = lambda header: {}
    keys: frozenset[str] = frozenset()


def read_gguf_config(
    family: GGUFFamily,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    factors: Mapping[str, tuple[float, ...]],
) -> TransformerConfig:
    """Raises CheckpointError."""
    prefix = f"{family.architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields("metadata", own, prefix)
    for key, value in own.items():
        if key not in _KEYS and key not in family.keys and value:
            raise fields.unsupported(key, value)
    hidden_size, num_heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", max(1, hidden_size // num_heads))
    fields.check("attention.value_length", head_dim)
    header = Header(fields, tensors, factors, head_dim, layer_count(fields, "block_count"))
    layers = family.layers(header)
    common = TransformerConfig(
        architecture=family.name,
        vocab_size=_vocab_size(metadata, fields),
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(fields),
        layers=layers,
        num_heads=num_heads,
        num_kv_heads=fields.count("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=decimal(fields.number("attention.layer_norm_rms_epsilon")),
        max_positions=reach(fields.count("context_length"), layers),
        qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
    )
    return replace(common, **family.traits(header))


def _alike(header: Header) -> tuple[Layer, ...]:
    return (Layer(rope=header.rope()),) * header.num_layers


def _llama(header: Header) -> tuple[Layer, ...]:
    """Mixtral goes by this name too."""
    return (
        _with_experts(header, _alike(header)) if header.fields.values.get("expert_count") else _alike(header)
    )


def _with_experts(header: Header, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple(
        replace(layer, experts=f"blk.{index}.ffn_gate_inp.weight" in header.tensors)
        for index, layer in enumerate(layers)
    )


def _smollm3(header: Header) -> tuple[Layer, ...]:
    rope = header.rope()
    return tuple(
        Layer(rope=rope if (index + 1) % _SMOLLM3_PERIOD else None) for index in range(header.num_layers)
    )


def _phi3(header: Header) -> tuple[Layer, ...]:
    return (Layer(rope=header.rope(partial=True), window=header.window()),) * header.num_layers


def _gemma2(header: Header) -> tuple[Layer, ...]:
    rope, window = header.rope(), header.window(4096)
    return tuple(Layer(rope=rope, window=window if local else 0) for local in header.local(2))


def _gemma3(header: Header) -> tuple[Layer, ...]:
    """Local layers have positions of their own, which are not stretched."""
    window, everywhere = header.window(), Layer(rope=header.rope())
    theta = decimal(header.fields.number("rope.freq_base_swa", 10000.0))
    local_layer = Layer(rope=Rope(theta=theta, num_rotated=header.head_dim), window=window)
    if not window:
        return (everywhere,) * header.num_layers
    return tuple(local_layer if local else everywhere for local in header.local(6))


def _gpt_oss(header: Header) -> tuple[Layer, ...]:
    rope, window = header.rope(truncate=False), header.window()
    layers = tuple(Layer(rope=rope, window=window if local else 0) for local in header.local(2))
    return _with_experts(header, layers)


def _llama4(header: Header) -> tuple[Layer, ...]:
    """A window of 0 stands for no chunks, and positions in every layer."""
    if any(name.endswith("ffn_gate_inp.weight") for name in header.tensors):
        count = header.fields.values.get("expert_count")
        raise header.fields.unsupported(
            "expert_count", count, ": of Llama 4, models without experts are served"
        )
    rope = header.rope()
    if _llama4_without_chunks(header):
        return (Layer(rope=rope),) * header.num_layers
    rotated = [(index + 1) % _LLAMA4_PERIOD != 0 for index in range(header.num_layers)]
    local = header.local(_LLAMA4_PERIOD)
    return tuple(
        Layer(rope=rope if turns else None, chunk=_LLAMA4_CHUNK if chunked else 0)
        for turns, chunked in zip(rotated, local, strict=True)
    )


def _llama4_without_chunks(header: Header) -> bool:
    return header.fields.values.get("attention.sliding_window") == 0


def _llama4_traits(header: Header) -> dict[str, Any]:
    tuning = None if _llama4_without_chunks(header) else _LLAMA4_TUNING
    return {"qk_norm": QKNorm.UNIT, "temperature_tuning": tuning}


def _gemma_traits(header: Header, largest: int) -> dict[str, Any]:
    """Stored norms have their offset added already."""
    fields, hidden_size = header.fields, header.fields.count("embedding_length")
    per_head = hidden_size // fields.count("attention.head_count")
    return {
        "norm_placement": NormPlacement.SANDWICH,
        "activation": Activation.GELU_TANH,
        "attention_scale": (per_head if header.num_layers == largest else header.head_dim) ** -0.5,
        "logit_soft_cap": _soft_cap(fields, "final_logit_softcapping", 0.0),
        "embedding_scale": hidden_size**0.5,
    }


def _gemma2_traits(header: Header) -> dict[str, Any]:
    return _gemma_traits(header, _GEMMA2_27B_LAYERS) | {
        "attention_soft_cap": _soft_cap(header.fields, "attn_logit_softcapping", 50.0),
        "logit_soft_cap": _soft_cap(header.fields, "final_logit_softcapping", 30.0),
    }


def _soft_cap(fields: Fields, name: str, default: float) -> float:
    return decimal(fields.number(name)) if fields.has(name) else default


def _experts(header: Header, *, bias: bool = False) -> Experts:
    fields = header.fields
    fields.check("expert_gating_func", *_SOFTMAX_GATING)
    fields.check("expert_weights_norm", True)
    return Experts(
        count=fields.count("expert_count"),
        per_token=fields.count("expert_used_count"),
        intermediate_size=fields.count("expert_feed_forward_length", _intermediate_size(fields)),
        bias=bias,
    )


def _llama_traits(header: Header) -> dict[str, Any]:
    if not header.fields.values.get("expert_count"):
        return {}
    return {"architecture": "mixtral", "experts": _experts(header)}


def _gpt_oss_traits(header: Header) -> dict[str, Any]:
    experts = _experts(header, bias=True)
    return {"experts": experts, "sinks": True, "activation": Activation.CLAMPED_SWISH}


def _intermediate_size(fields: Fields) -> int:
    """Of the layers without experts, which files of experts alone may leave out."""
    return fields.count("feed_forward_length", fields.values.get("expert_feed_forward_length"))


def _vocab_size(metadata: Mapping[str, Any], fields: Fields) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, tuple) and tokens else fields.count("vocab_size")


_SOFT_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
GGUF_FAMILIES = (
    GGUFFamily(name="llama", architecture="llama", layers=_llama, traits=_llama_traits, keys=_EXPERT_KEYS),
    GGUFFamily(name="smollm3", architecture="smollm3", layers=_smollm3),
    GGUFFamily(name="qwen2", architecture="qwen2", layers=_alike),
    GGUFFamily(
        name="qwen3", architecture="qwen3", layers=_alike, traits=lambda header: {"qk_norm": QKNorm.HEAD}
    ),
    GGUFFamily(
        name="qwen3_moe",
        architecture="qwen3moe",
        layers=lambda header: _with_experts(header, _alike(header)),
        traits=lambda header: {"qk_norm": QKNorm.HEAD, "experts": _experts(header)},
        keys=_EXPERT_KEYS,
    ),
    GGUFFamily(
        name="gemma2",
        architecture="gemma2",
        layers=_gemma2,
        traits=_gemma2_traits,
        keys=_WINDOW_KEYS | _SOFT_CAPS,
    ),
    GGUFFamily(
        name="gemma3",
        architecture="gemma3",
        layers=_gemma3,
        traits=lambda header: _gemma_traits(header, _GEMMA3_27B_LAYERS) | {"qk_norm": QKNorm.HEAD},
        keys=_WINDOW_KEYS | {"final_logit_softcapping", "rope.freq_base_swa"},
    ),
    GGUFFamily(name="phi3", architecture="phi3", layers=_phi3, keys=frozenset({"attention.sliding_window"})),
    GGUFFamily(
        name="olmo2",
        architecture="olmo2",
        layers=_alike,
        traits=lambda header: {"norm_placement": NormPlacement.POST, "qk_norm": QKNorm.WHOLE},
    ),
    GGUFFamily(
        name="gpt-oss",
        architecture="gpt-oss",
        layers=_gpt_oss,
        traits=_gpt_oss_traits,
        keys=_EXPERT_KEYS | _WINDOW_KEYS,
    ),
    GGUFFamily(
        name="llama4",
        architecture="llama4",
        layers=_llama4,
        traits=_llama4_traits,
        keys=_EXPERT_KEYS | _WINDOW_KEYS | {"interleave_moe_layer_step", "leading_dense_block_count"},
    ),
)
