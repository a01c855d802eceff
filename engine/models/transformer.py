"""One decoder-only transformer, driven by its configuration.

It computes rows (tokens of many sequences side by side) and knows neither sequences nor requests; what its
layers are made of is in `layers.py`. Who changes the bits of what it computes raises
`cuda_kernels.ops.ARITHMETIC_VERSION`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.models.layers import Layers, Rows
from engine.models.weights import take_layer, take_norm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cuda_kernels.ops import Operations
    from engine.kv_storage import KVStorage
    from engine.models.config import TransformerConfig

__all__ = ["NORMED", "Rows", "Transformer"]

NORMED = -1  # a tap: behind the final norm


class Transformer:
    def __init__(self, config: TransformerConfig, weights: dict[str, torch.Tensor], ops: Operations) -> None:
        """`config`: from `for_context`. `weights`: from `load_weights`; emptied as they are taken."""
        self.config = config
        self.ops = ops
        self.embedding = weights.pop("embedding")
        self.layers = [take_layer(weights, config, index) for index in range(config.num_layers)]
        self.stack = Layers(config, self.layers, ops, self.embedding.device)
        self.final_norm = take_norm(weights, "final_norm", config)
        # Not by the configuration: files may have a head that it denies, or lack the one that it promises.
        self.head = weights.pop("head", self.embedding)
        assert not weights, f"weights without a place: {sorted(weights)[:3]}"
        # Rounded as the reference models round it, in the dtype of the embedding.
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=self.embedding.dtype).item()

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
        places = self.stack.places(rows.positions)
        hidden = self.embed(rows.tokens)
        seen: dict[int, torch.Tensor] = {}
        for index in range(self.config.num_layers) if layers is None else layers:
            if index in taps:
                seen[index] = hidden
            hidden = self.stack.compute(index, hidden, places, rows, storage)
        seen[self.config.num_layers] = hidden
        if NORMED in taps:
            seen[NORMED] = self.normed(hidden)
        return hidden, tuple(seen[tap] for tap in taps)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [T] -> [T, hidden]"""
        hidden = self.embedding.index_select(0, tokens)
        return hidden * self.embedding_scale if self.embedding_scale != 1.0 else hidden

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The residual stream behind the last layer [T, hidden] -> what the head sees."""
        return self.ops.rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)

    def logits(self, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The residual stream behind the last layer [T, hidden], rows int64 [R] -> float32 [R, vocab]."""
        count = wanted.shape[0]
        # Padding repeats the last wanted row: the head's row count is a multiple as well.
        padding = -count % self.ops.row_multiple
        chosen = hidden.index_select(0, torch.cat((wanted, wanted[-1:].expand(padding))))
        return self.head_logits(self.normed(chosen))[:count]

    def head_logits(self, normed: torch.Tensor) -> torch.Tensor:
        """What the head sees [T, hidden], T a multiple of `ops.row_multiple` -> float32 [T, vocab]."""
        logits = self.ops.linear(normed, self.head, None).float()
        cap = self.config.logit_soft_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits
