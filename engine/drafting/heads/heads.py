"""Heads that guess from the target's own hidden states: EAGLE (Li 2024), EAGLE-3 (Li 2025), and multi-token
prediction (DeepSeek-V3, 2024).

Each is a few decoder layers with KV of their own. Their row of place p knows the target's hidden states there
and the token behind it, and makes a feature of place p + 1, from which the token after that is guessed. Where
the target has not been yet, the feature that was made stands for its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from engine.kv_storage import KVStorage
    from engine.models.config import TransformerConfig
    from engine.models.layers import Layers, Rows
    from engine.models.transformer import Transformer


class Head(Protocol):
    @property
    def taps(self) -> tuple[int, ...]:
        """What it wants to see of the target (`Transformer.compute`)."""
        ...

    @property
    def config(self) -> TransformerConfig:
        """Of its layers, whose KV somebody keeps."""
        ...

    def features(self, seen: torch.Tensor) -> torch.Tensor:
        """seen [T, taps * the target's hidden size], tap beside tap -> features [T, hidden]; T is a multiple
        of `Operations.row_multiple`, as it is below."""
        ...

    def compute(self, features: torch.Tensor, rows: Rows, storage: KVStorage) -> torch.Tensor:
        """Features [T, hidden] of the rows' places, whose tokens are those behind them; fills their KV slots
        -> features of the next places [T, hidden]."""
        ...

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the next places [T, hidden] -> float32 [T, the target's vocabulary]"""
        ...


@dataclass(frozen=True, slots=True)
class FusingHead:
    """EAGLE and multi-token prediction: embedding and feature become one stream before the layers. Both its
    feature and the target's are what the target's own head reads. Norms that it does not have are None."""

    layers: Layers
    target: Transformer
    taps: tuple[int, ...]
    fuse: torch.Tensor  # [hidden, 2 * hidden]: embedding, feature
    fuse_bias: torch.Tensor | None = None
    embedding_norm: torch.Tensor | None = None
    feature_norm: torch.Tensor | None = None
    out_norm: torch.Tensor | None = None

    @property
    def config(self) -> TransformerConfig:
        return self.layers.config

    def features(self, seen: torch.Tensor) -> torch.Tensor:
        return seen

    def compute(self, features: torch.Tensor, rows: Rows, storage: KVStorage) -> torch.Tensor:
        layers = self.layers
        embedded = layers.norm(self.target.embedding.index_select(0, rows.tokens), self.embedding_norm)
        both = torch.cat((embedded, layers.norm(features, self.feature_norm)), dim=-1)
        hidden = layers.ops.linear(both, self.fuse, self.fuse_bias)
        places = layers.places(rows.positions)
        for index in range(layers.config.num_layers):
            hidden = layers.compute(index, hidden, places, rows, storage)
        return layers.norm(hidden, self.out_norm)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.target.head_logits(features)


@dataclass(frozen=True, slots=True)
class Eagle3Head:
    """The first layer's attention reads embedding and feature side by side; features are fused from several
    of the target's layers, and its own are read by a head of its own."""

    layers: Layers
    taps: tuple[int, ...]
    embedding: torch.Tensor  # [vocab, hidden]
    fuse: torch.Tensor | None  # [hidden, taps * the target's hidden size]; None: one tap, taken as it is
    embedding_norm: torch.Tensor
    feature_norm: torch.Tensor
    out_norm: torch.Tensor
    head: torch.Tensor  # [known, hidden]
    known: torch.Tensor | None = None  # int64 [known]: the tokens that its head knows; None: all
    seen_norms: tuple[torch.Tensor, ...] = ()  # before `fuse`: of each tap, or one of all side by side
    residual_is_normed: bool = False
    passes_normed: bool = False  # its own features are normed (EAGLE 3.1)

    @property
    def config(self) -> TransformerConfig:
        return self.layers.config

    def features(self, seen: torch.Tensor) -> torch.Tensor:
        if self.fuse is None:
            return seen
        if self.seen_norms:
            parts = seen.chunk(len(self.seen_norms), dim=-1)
            pairs = zip(parts, self.seen_norms, strict=True)
            seen = torch.cat([self.layers.norm(part.contiguous(), weight) for part, weight in pairs], dim=-1)
        return self.layers.ops.linear(seen, self.fuse, None)

    def compute(self, features: torch.Tensor, rows: Rows, storage: KVStorage) -> torch.Tensor:
        layers = self.layers
        embedded = layers.norm(self.embedding.index_select(0, rows.tokens), self.embedding_norm)
        normed = layers.norm(features, self.feature_norm)
        hidden = normed if self.residual_is_normed else features
        places = layers.places(rows.positions)
        hidden = layers.compute(0, hidden, places, rows, storage, torch.cat((embedded, normed), dim=-1))
        for index in range(1, layers.config.num_layers):
            hidden = layers.compute(index, hidden, places, rows, storage)
        return layers.norm(hidden, self.out_norm) if self.passes_normed else hidden

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        normed = features if self.passes_normed else self.layers.norm(features, self.out_norm)
        logits = self.layers.ops.linear(normed, self.head, None).float()
        if self.known is None:
            return logits
        everywhere = logits.new_full((len(logits), len(self.embedding)), float("-inf"))
        return everywhere.index_copy_(1, self.known, logits)
