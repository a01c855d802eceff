"""The layers of a block-diffusion drafter (DFlash, Chen 2026): a block of places sees itself as a whole, and
keys and values that are made of the target's own hidden states instead of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.models.layers import Layers
from engine.models.weights import MLPWeights

if TYPE_CHECKING:
    from cuda_kernels.ops import Operations
    from engine.drafting.dflash.config import DFlashConfig
    from engine.drafting.dflash.weights import Convolution, DFlashWeights
    from engine.kv_storage import KVStorage
    from engine.models.layers import Places, Rows


class BlockLayers(Layers):
    """Convolutions, where there are any (DFlash-2), look back within the block."""

    def __init__(
        self, config: DFlashConfig, weights: DFlashWeights, ops: Operations, device: torch.device
    ) -> None:
        super().__init__(config.layers, weights.layers, ops, device)
        self.block_size = config.block_size
        self.convolutions = weights.convolutions
        self.projection = weights.projection
        self.context_norm = weights.context_norm
        self.final_norm = weights.final_norm
        self.causal = config.causal

    def write_context(self, seen: torch.Tensor, rows: Rows, storage: KVStorage) -> None:
        """seen [T, taps * hidden], the target's hidden states of the rows' places -> their keys and values
        in every layer."""
        context = self.norm(self.ops.linear(seen, self.projection, None), self.context_norm)
        places = self.places(rows.positions[: rows.num_rows])
        first, heads = self.config.num_heads * self.config.head_dim, self.config.num_kv_heads
        for index, layer in enumerate(self.weights):
            bias = layer.qkv_bias[first:] if layer.qkv_bias is not None else None
            mixed = self.ops.linear(context, layer.qkv[first:], bias)[: rows.num_rows]
            keys, values = mixed.view(rows.num_rows, 2, heads, self.config.head_dim).unbind(1)
            keys = self.norm(keys, layer.k_norm)
            rotation = places[self.config.layers[index].rope].rotation
            if rotation is not None:
                keys = self.ops.rotary(keys, *rotation)
            kv_rows = rows.kv_rows[self.group_of[index]]
            self.ops.write_kv(storage.keys[index], kv_rows, keys)
            self.ops.write_kv(storage.values[index], kv_rows, values)

    def blocks(self, hidden: torch.Tensor, seeing: dict[bool, Rows], storage: KVStorage) -> torch.Tensor:
        """hidden [padded T, hidden], the embeddings of whole blocks; `seeing`: their rows for layers that are
        causal and for those that are not -> what the head reads [padded T, hidden]."""
        places = self.places(next(iter(seeing.values())).positions)
        for index, causal in enumerate(self.causal):
            if self.convolutions:
                hidden = self._convolved(index, hidden, places, seeing[causal], storage)
            else:
                hidden = self.compute(index, hidden, places, seeing[causal], storage)
        return self.norm(hidden, self.final_norm)

    def _convolved(
        self,
        index: int,
        hidden: torch.Tensor,
        places: dict[object, Places],
        rows: Rows,
        storage: KVStorage,
    ) -> torch.Tensor:
        """A layer whose attention and MLP have a convolution before and behind them."""
        layer, (attention, mlp) = self.weights[index], self.convolutions[index]
        rope = self.config.layers[index].rope
        normed = self.norm(hidden, layer.attention_norm)
        kernels = self._kernels(normed, attention)
        read = self._along(normed, attention.base[0], kernels[:, 0], rows.num_rows)
        moved = self._attention(index, layer, read, places[rope], rows, storage)
        hidden = hidden + self._along(moved, attention.base[1], kernels[:, 1], rows.num_rows)
        normed = self.norm(hidden, layer.mlp_norm)
        kernels = self._kernels(normed, mlp)
        read = self._along(normed, mlp.base[0], kernels[:, 0], rows.num_rows)
        assert isinstance(layer.mlp, MLPWeights), "a drafter's layers have one MLP"
        moved = self._mlp(layer.mlp, read)
        return hidden + self._along(moved, mlp.base[1], kernels[:, 1], rows.num_rows)

    def _kernels(self, normed: torch.Tensor, convolution: Convolution) -> torch.Tensor:
        """-> [T, 2, size, groups]: what each row adds to the base before and behind"""
        size = convolution.base.shape[1]
        found = self.ops.linear(normed, convolution.projection, None)
        return found.view(len(normed), 2, size, -1)

    def _along(
        self, x: torch.Tensor, base: torch.Tensor, kernels: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """x [padded T, hidden], base [size, hidden], kernels [padded T, size, groups] -> the sum over places
        back to the beginning of the block; padding stays what it is."""
        columns = x.shape[1] // kernels.shape[2]
        blocks = x[:num_rows].view(-1, self.block_size, x.shape[1])
        weights = kernels[:num_rows].repeat_interleave(columns, dim=-1) + base
        weights = weights.view(*blocks.shape[:2], *base.shape)
        found = blocks * weights[:, :, 0]
        for back in range(1, min(len(base), self.block_size)):
            found[:, back:] += blocks[:, :-back] * weights[:, back:, back]
        return torch.cat((found.view(num_rows, -1), x[num_rows:]))
