"""From what a block's places are to what may stand there: one place after another, for many blocks at once.

A plain drafter knows nothing of the places before. DSpark's Markov head adds a bias by the token drawn before
(Semi-autoregressive drafting, DeepSpec 2026); DFlash-2 scores a few candidates against it. Whatever is added,
it is found for the tokens that were chosen before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.drafting.dflash.config import MarkovKind

if TYPE_CHECKING:
    from cuda_kernels.ops import Operations
    from engine.drafting.dflash.config import DFlashConfig
    from engine.drafting.dflash.weights import Affine, DFlashWeights, Markov, Selector


class Guessed(NamedTuple):
    """logits float32 [R, vocab]; how sure the drafter is that its guess stands, float32 [R] of 0 .. 1."""

    logits: torch.Tensor
    confidence: torch.Tensor | None


class BlockHeads:
    def __init__(self, config: DFlashConfig, weights: DFlashWeights, ops: Operations) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops

    @property
    def spreads(self) -> bool:
        """Whether a place's candidates are the same whatever stands before it."""
        return self.weights.markov is None and self.weights.selector is None

    def base(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, hidden] of places -> float32 [T, known]"""
        logits = self.ops.linear(hidden, self.weights.head, None).float()
        if self.config.output_multiplier != 1.0:
            logits = logits.mul_(self.config.output_multiplier)
        cap = self.config.soft_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def begin(self, count: int) -> torch.Tensor:
        """The memory of so many blocks before their first place: [count, rank], or [count, 0]."""
        rank = self.config.markov_rank if self.config.markov is MarkovKind.RNN else 0
        return self.weights.head.new_zeros(count, rank)

    def place(
        self, hidden: torch.Tensor, base: torch.Tensor, before: torch.Tensor, memory: torch.Tensor
    ) -> tuple[Guessed, torch.Tensor]:
        """One place of R blocks: hidden [R, hidden], base float32 [R, known], `before` int64 [R], the tokens
        before it -> what may stand there, and the memory behind it."""
        markov, selector = self.weights.markov, self.weights.selector
        confidence = self._confidence(hidden, before) if self.weights.confidence is not None else None
        if markov is not None:
            bias, memory = self._bias(markov, hidden, before, memory)
            base = base + bias.float()
        elif selector is not None:
            base = self._selected(selector, hidden, base, before)
        return Guessed(self._everywhere(base), confidence), memory

    def _bias(
        self, markov: Markov, hidden: torch.Tensor, before: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> [R, known]"""
        drawn = markov.before.index_select(0, before)
        if markov.joint is not None and markov.kind is MarkovKind.GATED:
            drawn = drawn * torch.sigmoid(self._affine(torch.cat((hidden, drawn), dim=-1), markov.joint))
        elif markov.joint is not None:
            mixed = self._affine(torch.cat((memory, drawn, hidden), dim=-1), markov.joint)
            gate, fresh, told = mixed.chunk(3, dim=-1)
            gate = torch.sigmoid(gate)
            memory = gate * memory + (1.0 - gate) * torch.tanh(fresh)
            drawn = torch.tanh(told)
        return self.ops.linear(drawn, markov.behind, None), memory

    def _selected(
        self, selector: Selector, hidden: torch.Tensor, base: torch.Tensor, before: torch.Tensor
    ) -> torch.Tensor:
        """Only a few of the most likely stand, each scored against the token before it."""
        values, tokens = base.topk(selector.top_k, dim=-1)
        wish = selector.predecessors.index_select(0, before) * self.ops.linear(
            hidden, selector.projection, None
        )
        scores = torch.einsum("br,bkr->bk", wish, selector.successors[tokens])
        return torch.full_like(base, float("-inf")).scatter_(1, tokens, values + scores.float())

    def _confidence(self, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        assert self.weights.confidence is not None, "a drafter without a head for it"
        if self.config.confidence_with_markov and self.weights.markov is not None:
            drawn = self.weights.markov.before.index_select(0, before)
            hidden = torch.cat((hidden, drawn), dim=-1)
        return torch.sigmoid(self._affine(hidden, self.weights.confidence).float()).squeeze(-1)

    def _affine(self, x: torch.Tensor, affine: Affine) -> torch.Tensor:
        return self.ops.linear(x, affine.weight, affine.bias)

    def _everywhere(self, logits: torch.Tensor) -> torch.Tensor:
        token_map = self.weights.token_map
        if token_map is None:
            return logits
        found = logits.new_full((len(logits), self.config.layers.vocab_size), float("-inf"))
        return found.index_copy_(1, token_map, logits)
