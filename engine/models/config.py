"""The shape of a transformer as plain numbers; no torch here, so that the server may read it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary scaling. `linear` divides positions by `factor`; `llama3` rescales per frequency band."""

    kind: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    architecture: str  # "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache keeps of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
