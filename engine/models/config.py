"""The shape of a transformer as plain numbers; no torch here, so that the server may read it too."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ScalingKind(StrEnum):
    LINEAR = "linear"  # positions divided by `factor`
    DYNAMIC = "dynamic"  # NTK: beyond `original_max_positions` the base grows with the position
    LLAMA3 = "llama3"  # rescaled per frequency band (Llama 3.1)
    YARN = "yarn"  # Peng 2023
    LONGROPE = "longrope"  # a divisor for each frequency, of two lists (Ding 2024)
    FACTORS = "factors"  # a divisor for each frequency: one list, as of a GGUF file or once it is chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched. Fields that a kind does not name are not read for it."""

    kind: ScalingKind
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: turns within the original context from which frequencies stay as they are
    beta_slow: float = 1.0  # yarn: turns below which they are divided by `factor`
    truncate: bool = True  # yarn: bounds of the ramp are rounded to whole dimensions
    attention_factor: float = 1.0  # yarn, longrope: multiplies cosine and sine
    factors: tuple[float, ...] = ()  # factors; longrope: where the served context fits the original one
    long_factors: tuple[float, ...] = ()  # longrope: where it does not


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions: the first `num_rotated` numbers of a head turn, as pairs of halves (Su 2021)."""

    theta: float
    num_rotated: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What may differ from layer to layer."""

    rope: Rope | None = None  # None: no positions at all
    window: int = 0  # tokens that a token sees, itself included; 0: all before it
    chunk: int = 0  # it sees its own chunk of so many tokens, up to itself; 0: all before it
    experts: bool = False  # instead of one gated MLP

    def __post_init__(self) -> None:
        assert not (self.window and self.chunk), "a layer has a window or chunks, not both"


class NormPlacement(StrEnum):
    PRE = "pre"  # before attention and MLP
    POST = "post"  # after each, before the sum (OLMo 2)
    SANDWICH = "sandwich"  # both (Gemma)


class QKNorm(StrEnum):
    NONE = "none"
    HEAD = "head"  # per head, weights [D], before the rotation (Qwen3, Gemma 3)
    WHOLE = "whole"  # over the whole projection, weights [Hq * D] and [Hkv * D] (OLMo 2)
    UNIT = "unit"  # per head, no weights, after the rotation, and only in layers that rotate (Llama 4)


class Activation(StrEnum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    CLAMPED_SWISH = "clamped_swish"  # GPT-OSS: (min(up, 7) + 1) * gate * sigmoid(1.702 gate), both clamped


class Routing(StrEnum):
    """How the router's logits become the weights of the chosen experts."""

    SOFTMAX_ALL = "softmax_all"  # softmax over all experts, the largest are taken as they are
    SOFTMAX_CHOSEN = "softmax_chosen"  # softmax over the chosen ones only: the above, scaled to a sum of 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    count: int
    per_token: int
    intermediate_size: int
    routing: Routing = Routing.SOFTMAX_CHOSEN
    bias: bool = False  # on the router and on every expert


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureTuning:
    """Llama 4's layers without positions multiply queries by 1 + scale * log(1 + floor((p + 1) / floor))."""

    floor: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    architecture: str  # "llama", "qwen3", ...: the name of its family
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the layers with one MLP
    layers: tuple[Layer, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    norm_placement: NormPlacement = NormPlacement.PRE
    norm_offset: bool = False  # stored norm weights are one less than what multiplies (Gemma)
    qk_norm: QKNorm = QKNorm.NONE
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output
    mlp_bias: bool = False
    activation: Activation = Activation.SILU
    attention_scale: float = 0.0  # multiplies q k; 0: 1 / sqrt(head_dim)
    attention_soft_cap: float = 0.0  # scores s become cap * tanh(s / cap); 0: they stay
    logit_soft_cap: float = 0.0
    sinks: bool = False  # one more score per head, which takes weight and gives nothing (GPT-OSS)
    embedding_scale: float = 1.0
    temperature_tuning: TemperatureTuning | None = None
    experts: Experts | None = None
    tie_embeddings: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache keeps of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
