"""One decoder-only transformer, driven by its configuration.

Blocks of grouped-query attention and a gated MLP (Llama, Touvron 2023); what families add to that shape
(norms around or within a block, windows, sinks, caps, experts) is data of `TransformerConfig` and at most a
few lines here. It computes rows (tokens of many sequences side by side) and knows neither sequences nor
requests. Who changes the bits of what it computes raises `cuda_kernels.ops.ARITHMETIC_VERSION`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.models.config import QKNorm
from engine.models.kv_groups import kv_groups
from engine.models.rotary import Rotary
from engine.models.weights import LayerWeights, MixtureWeights, MLPWeights, take_layer, take_norm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cuda_kernels.ops import AttentionPlan, Operations
    from engine.kv_storage import KVStorage
    from engine.models.config import TransformerConfig

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosine, sine
NORMED = -1  # a tap: behind the final norm


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
class _Places:
    """What a layer needs of a step's positions: its rotation, or what multiplies its queries."""

    rotation: Rotation | None
    query_scale: torch.Tensor | None  # float32 [padded T, 1, 1]


class Transformer:
    def __init__(self, config: TransformerConfig, weights: dict[str, torch.Tensor], ops: Operations) -> None:
        """`config`: from `for_context`. `weights`: from `load_weights`; emptied as they are taken."""
        self.config = config
        self.ops = ops
        self.embedding = weights.pop("embedding")
        self.layers = [take_layer(weights, config, index) for index in range(config.num_layers)]
        self.final_norm = take_norm(weights, "final_norm", config)
        self.head = self.embedding if config.tie_embeddings else weights.pop("head")
        assert not weights, f"weights without a place: {sorted(weights)[:3]}"
        # Rounded as the reference models round it, in the dtype of the embedding.
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=self.embedding.dtype).item()
        self.attention_scale = config.attention_scale or config.head_dim**-0.5
        self.group_of = {
            layer: group for group, members in enumerate(kv_groups(config)) for layer in members.layers
        }
        ropes = dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None)
        self.rotaries = {rope: Rotary(rope, self.embedding.device) for rope in ropes}

    def forward(self, rows: Rows, storage: KVStorage) -> torch.Tensor:
        """Compute the rows, fill their KV slots -> float32 logits [R, vocab] of `rows.wanted`."""
        return self.logits(self.compute(rows, storage)[0], rows.wanted)

    def compute(
        self,
        rows: Rows,
        storage: KVStorage,
        taps: tuple[int, ...] = (),
        layers: Iterable[int] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Fill the rows' KV slots -> the residual stream behind the last layer [padded T, hidden], and what
        it was at each of `taps`: k = as it enters layer k (0: embeddings; the number of layers: behind the
        last), `NORMED` = what the head sees. `layers`: those to compute, the others are skipped; None = all.
        """
        places = self._places(rows.positions)
        hidden = self.embed(rows.tokens)
        seen: dict[int, torch.Tensor] = {}
        for index in range(self.config.num_layers) if layers is None else layers:
            if index in taps:
                seen[index] = hidden
            hidden = self._block(index, hidden, places, rows, storage)
        seen[self.config.num_layers] = hidden
        if NORMED in taps:
            seen[NORMED] = self.ops.rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)
        return hidden, tuple(seen[tap] for tap in taps)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [T] -> [T, hidden]"""
        hidden = self.embedding.index_select(0, tokens)
        return hidden * self.embedding_scale if self.embedding_scale != 1.0 else hidden

    def _block(
        self,
        index: int,
        hidden: torch.Tensor,
        places: dict[object, _Places],
        rows: Rows,
        storage: KVStorage,
    ) -> torch.Tensor:
        layer = self.layers[index]
        normed = self._norm(hidden, layer.attention_norm)
        attended = self._attention(
            index, layer, normed, places[self.config.layers[index].rope], rows, storage
        )
        hidden = hidden + self._norm(attended, layer.attention_post_norm)
        normed = self._norm(hidden, layer.mlp_norm)
        mlp = layer.mlp
        moved = self._mlp(mlp, normed) if isinstance(mlp, MLPWeights) else self._mixture(mlp, normed)
        return hidden + self._norm(moved, layer.mlp_post_norm)

    def _places(self, positions: torch.Tensor) -> dict[object, _Places]:
        """By `Layer.rope`; layers without one are under None."""
        places: dict[object, _Places] = {
            rope: _Places(rotary(positions), None) for rope, rotary in self.rotaries.items()
        }
        tuning = self.config.temperature_tuning
        scale = None
        if tuning is not None:
            scale = 1.0 + tuning.scale * torch.log1p(torch.floor((positions.float() + 1.0) / tuning.floor))
            scale = scale[:, None, None]
        places[None] = _Places(None, scale)
        return places

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """A family that has no norm at this place has no weight for it."""
        return x if weight is None else self.ops.rms_norm(x, weight, self.config.rms_norm_eps)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        normed: torch.Tensor,
        places: _Places,
        rows: Rows,
        storage: KVStorage,
    ) -> torch.Tensor:
        """-> [padded T, hidden]"""
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

    def _placed(self, layer: LayerWeights, heads: torch.Tensor, places: _Places) -> torch.Tensor:
        """Queries and keys [padded T, Hq + Hkv, D] -> the same with norms and positions in them."""
        ops, config = self.ops, self.config
        num_heads = config.num_heads
        if config.qk_norm in (QKNorm.HEAD, QKNorm.WHOLE):
            query, key = heads[:, :num_heads], heads[:, num_heads:]
            if config.qk_norm is QKNorm.WHOLE:
                query, key = query.flatten(1), key.flatten(1)
            query, key = self._norm(query, layer.q_norm), self._norm(key, layer.k_norm)
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

    def logits(self, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The residual stream behind the last layer [T, hidden], rows int64 [R] -> float32 [R, vocab]."""
        count = wanted.shape[0]
        # Padding repeats the last wanted row: the head's row count is a multiple as well.
        padding = -count % self.ops.row_multiple
        chosen = hidden.index_select(0, torch.cat((wanted, wanted[-1:].expand(padding))))
        normed = self.ops.rms_norm(chosen, self.final_norm, self.config.rms_norm_eps)
        logits = self.ops.linear(normed, self.head, None)[:count].float()
        cap = self.config.logit_soft_cap
        return (logits / cap).tanh_().mul_(cap) if cap else logits
