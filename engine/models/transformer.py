"""One decoder-only transformer, driven by its configuration: the Llama shape (Touvron 2023).

Pre-norm blocks of grouped-query attention with rotary positions and a gated MLP. It computes rows
(tokens of many sequences side by side) and knows neither sequences nor requests. Who changes the bits of what
it computes raises `cuda_kernels.ops.ARITHMETIC_VERSION`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cuda_kernels.ops import AttentionPlan, Operations
    from engine.kv_storage import KVStorage
    from engine.models.config import TransformerConfig


@dataclass(frozen=True, slots=True)
class Rows:
    """T real rows, padded to a multiple of `Operations.row_multiple`.

    tokens, positions: int64 [padded T]. kv_rows: int64 [T * Hkv], flat (page, head, slot) places in the
    KV storage. wanted: int64 [R], the rows whose logits somebody asked for.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    num_rows: int
    kv_rows: torch.Tensor
    attention: AttentionPlan
    wanted: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor
    qkv: torch.Tensor  # [(Hq + 2 Hkv) * D, hidden]
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class Transformer:
    def __init__(self, config: TransformerConfig, weights: dict[str, torch.Tensor], ops: Operations) -> None:
        """`weights`: Hugging Face names, as `load_weights` gives them; emptied as they are taken over."""
        self.config = config
        self.ops = ops
        self.embedding = weights.pop("model.embed_tokens.weight")
        self.layers = [_take_layer(weights, index) for index in range(config.num_layers)]
        self.final_norm = weights.pop("model.norm.weight")
        self.head = self.embedding if config.tie_embeddings else weights.pop("lm_head.weight")
        assert not weights, f"weights without a place: {sorted(weights)[:3]}"
        self.inverse_frequencies = inverse_frequencies(config).to(self.embedding.device)

    def forward(self, rows: Rows, storage: KVStorage) -> torch.Tensor:
        """Compute the rows, fill their KV slots -> float32 logits [R, vocab] of `rows.wanted`."""
        ops, config = self.ops, self.config
        angles = rows.positions[:, None, None].float() * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        hidden = self.embedding.index_select(0, rows.tokens)
        for layer, keys, values in zip(self.layers, storage.keys, storage.values, strict=True):
            normed = ops.rms_norm(hidden, layer.attention_norm, config.rms_norm_eps)
            attended = self._attention(layer, normed, cos, sin, rows, keys, values)
            hidden = hidden + ops.linear(attended, layer.out, layer.out_bias)
            normed = ops.rms_norm(hidden, layer.mlp_norm, config.rms_norm_eps)
            gated = ops.gated_silu(ops.linear(normed, layer.gate_up, layer.gate_up_bias))
            hidden = hidden + ops.linear(gated, layer.down, layer.down_bias)
        return self._logits(hidden, rows.wanted)

    def _attention(
        self,
        layer: _Layer,
        normed: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rows: Rows,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """-> [padded T, Hq * D] in the dtype of the rows"""
        heads, kv_heads, size = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        mixed = self.ops.linear(normed, layer.qkv, layer.qkv_bias)
        mixed = mixed.view(-1, heads + 2 * kv_heads, size)
        rotated = self.ops.rotary(mixed[:, : heads + kv_heads], cos, sin)
        self.ops.write_kv(keys, rows.kv_rows, rotated[: rows.num_rows, heads:])
        self.ops.write_kv(values, rows.kv_rows, mixed[: rows.num_rows, heads + kv_heads :])
        attended = rows.attention(rotated[:, :heads], keys, values)
        return attended.view(-1, heads * size).to(normed.dtype)

    def _logits(self, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        count = wanted.shape[0]
        # Padding repeats the last wanted row: the head's row count is a multiple as well.
        padding = -count % self.ops.row_multiple
        chosen = hidden.index_select(0, torch.cat((wanted, wanted[-1:].expand(padding))))
        normed = self.ops.rms_norm(chosen, self.final_norm, self.config.rms_norm_eps)
        return self.ops.linear(normed, self.head, None)[:count].float()


def _take_layer(weights: dict[str, torch.Tensor], index: int) -> _Layer:
    prefix = f"model.layers.{index}."

    def weight(name: str) -> torch.Tensor:
        return weights.pop(f"{prefix}{name}.weight")

    def bias(name: str) -> torch.Tensor | None:
        return weights.pop(f"{prefix}{name}.bias", None)

    def biases(*names: str) -> torch.Tensor | None:
        found = [value for name in names if (value := bias(name)) is not None]
        return torch.cat(found) if found else None

    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up = ("mlp.gate_proj", "mlp.up_proj")
    return _Layer(
        attention_norm=weight("input_layernorm"),
        qkv=torch.cat([weight(name) for name in qkv]),
        qkv_bias=biases(*qkv),
        out=weight("self_attn.o_proj"),
        out_bias=bias("self_attn.o_proj"),
        mlp_norm=weight("post_attention_layernorm"),
        gate_up=torch.cat([weight(name) for name in gate_up]),
        gate_up_bias=biases(*gate_up),
        down=weight("mlp.down_proj"),
        down_bias=bias("mlp.down_proj"),
    )


def inverse_frequencies(config: TransformerConfig) -> torch.Tensor:
    """float32 [D / 2]: rotary angle per position, scaled as the checkpoint says.

    `llama3` (Llama 3.1): wavelengths longer than original / low_freq_factor are stretched by `factor`, those
    shorter than original / high_freq_factor stay, the ones between are interpolated.
    """
    size = config.head_dim
    steps = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    plain = 1.0 / (config.rope_theta**steps)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    assert scaling.kind == "llama3", f"rope scaling {scaling.kind} passed the configuration check"
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return plain * keep + plain / scaling.factor * (1.0 - keep)
