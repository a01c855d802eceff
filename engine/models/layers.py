"""Decoder layers of one configuration: rows of the residual stream in, the same rows further on.

Grouped-query attention and a gated MLP (Llama, Touvron 2023); what families add to that shape (norms around
or within a block, windows, sinks, caps, experts) is data of `TransformerConfig` and at most a few lines here.
The transformer and the drafters' heads are made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.models.config import QKNorm
from engine.models.kv_groups import kv_groups
from engine.models.rotary import Rotary
from engine.models.weights import LayerWeights, MixtureWeights, MLPWeights

if TYPE_CHECKING:
    from cuda_kernels.ops import AttentionPlan, Operations
    from engine.kv_storage import KVStorage
    from engine.models.config import TransformerConfig

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosine, sine


@dataclass(frozen=True, slots=True)
class Rows:
    """T real rows, padded to a multiple of `Operations.row_multiple`.

    tokens, positions: int64 [padded T]. For each group of `kv_groups`, `kv_rows`: int64 [T * Hkv], flat
    (page, head, slot) places in the KV storage, and an attention plan. wanted: int64 [R], the rows whose
    logits somebody asked for.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    num_rows: int
    kv_rows: tuple[torch.Tensor, ...]
    attention: tuple[AttentionPlan, ...]
    wanted: torch.Tensor


@dataclass(frozen=True, slots=True)
class Places:
    """What a layer needs of a step's positions: its rotation, or what multiplies its queries."""

    rotation: Rotation | None
    query_scale: torch.Tensor | None  # float32 [padded T, 1, 1]


class Layers:
    def __init__(
        self, config: TransformerConfig, weights: list[LayerWeights], ops: Operations, device: torch.device
    ) -> None:
        """`config`: from `for_context`."""
        self.config = config
        self.weights = weights
        self.ops = ops
        self.attention_scale = config.attention_scale or config.head_dim**-0.5
        self.group_of = {
            layer: group for group, members in enumerate(kv_groups(config)) for layer in members.layers
        }
        ropes = dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None)
        self.rotaries = {rope: Rotary(rope, device) for rope in ropes}

    def places(self, positions: torch.Tensor) -> dict[object, Places]:
        """By `Layer.rope`; layers without one are under None."""
        places: dict[object, Places] = {
            rope: Places(rotary(positions), None) for rope, rotary in self.rotaries.items()
        }
        tuning = self.config.temperature_tuning
        scale = None
        if tuning is not None:
            scale = 1.0 + tuning.scale * torch.log1p(torch.floor((positions.float() + 1.0) / tuning.floor))
            scale = scale[:, None, None]
        places[None] = Places(None, scale)
        return places

    def compute(
        self,
        index: int,
        hidden: torch.Tensor,
        places: dict[object, Places],
        rows: Rows,
        storage: KVStorage,
        read: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Layer `index`: fill its KV slots of the rows -> the residual stream behind it [padded T, hidden].
        `read` [padded T, columns of its projections]: what attention reads; None: `hidden`, normed."""
        layer = self.weights[index]
        if read is None:
            read = self.norm(hidden, layer.attention_norm)
        attended = self._attention(index, layer, read, places[self.config.layers[index].rope], rows, storage)
        hidden = hidden + self.norm(attended, layer.attention_post_norm)
        normed = self.norm(hidden, layer.mlp_norm)
        mlp = layer.mlp
        moved = self._mlp(mlp, normed) if isinstance(mlp, MLPWeights) else self._mixture(mlp, normed)
        return hidden + self.norm(moved, layer.mlp_post_norm)

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """A family that has no norm at this place has no weight for it."""
        return x if weight is None else self.ops.rms_norm(x, weight, self.config.rms_norm_eps)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        normed: torch.Tensor,
        places: Places,
        rows: Rows,
        storage: KVStorage,
    ) -> torch.Tensor:
        """normed [padded T, columns] -> [padded T, hidden]"""
        config, ops = self.config, self.ops
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        mixed = ops.linear(normed, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * kv_heads, size)
        turned = self._placed(layer, mixed[:, : heads + kv_heads], places)
        group = self.group_of[index]
        keys, values, kv_rows = storage.keys[index], storage.values[index], rows.kv_rows[group]
        ops.write_kv(keys, kv_rows, turned[: rows.num_rows, heads:])
        ops.write_kv(values, kv_rows, mixed[: rows.num_rows, heads + kv_heads :])
        attended = rows.attention[group](
            turned[:, :heads], keys, values, self.attention_scale, config.attention_soft_cap, layer.sinks
        )
        return ops.linear(attended.view(-1, heads * size).to(normed.dtype), layer.out, layer.out_bias)

    def _placed(self, layer: LayerWeights, heads: torch.Tensor, places: Places) -> torch.Tensor:
        """Queries and keys [padded T, Hq + Hkv, D] -> the same with norms and positions in them."""
        ops, config = self.ops, self.config
        num_heads = config.num_heads
        if config.qk_norm in (QKNorm.HEAD, QKNorm.WHOLE):
            query, key = heads[:, :num_heads], heads[:, num_heads:]
            if config.qk_norm is QKNorm.WHOLE:
                query, key = query.flatten(1), key.flatten(1)
            query, key = self.norm(query, layer.q_norm), self.norm(key, layer.k_norm)
            heads = torch.cat((query, key), dim=1).view(heads.shape)
        if places.rotation is not None:
            heads = ops.rotary(heads, *places.rotation)
            if config.qk_norm is QKNorm.UNIT:
                heads = ops.rms_norm(heads, None, config.rms_norm_eps)
        if places.query_scale is not None:
            query = heads[:, :num_heads].float() * places.query_scale
            heads = torch.cat((query, heads[:, num_heads:].float()), dim=1)
        return heads

    def _mlp(self, mlp: MLPWeights, normed: torch.Tensor) -> torch.Tensor:
        gate_up = self.ops.linear(normed, mlp.gate_up, mlp.gate_up_bias)
        return self.ops.linear(self.ops.gated(gate_up, self.config.activation), mlp.down, mlp.down_bias)

    def _mixture(self, mixture: MixtureWeights, normed: torch.Tensor) -> torch.Tensor:
        ops, experts = self.ops, self.config.experts
        assert experts is not None, "a layer of experts in a model without any"
        scores = ops.linear(normed.to(mixture.router.dtype), mixture.router, mixture.router_bias)
        chosen, shares = ops.route(scores, experts.per_token, experts.routing)
        return ops.experts(normed, chosen, shares, mixture.experts, self.config.activation)
