"""Which tokens of two vocabularies are the same: equal bytes, or special tokens of equal text.

Token-level intersection (Timor 2025, "Accelerating LLM Inference with Lossless Speculative Decoding
Algorithms for Heterogeneous Vocabularies", arXiv 2502.05202): where a draft model chooses among the tokens
that both have, it chooses tokens of the target, with the noise of the target's own draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from engine.drafting.vocabularies.speller import Speller


class VocabularyMap:
    """`num_target`, `num_draft`: rows of the models' heads; tokens beyond them are not mapped."""

    def __init__(
        self, target: Speller, draft: Speller, num_target: int, num_draft: int, device: torch.device
    ) -> None:
        """Raises CheckpointError where the two have nothing in common."""
        pairs = [(theirs, draft.token_of(raw)) for raw, theirs in target.tokens()]
        pairs += [(theirs, draft.special.get(text)) for text, theirs in target.special.items()]
        self._draft_of = {
            theirs: mine
            for theirs, mine in pairs
            if mine is not None and theirs < num_target and mine < num_draft
        }
        if not self._draft_of:
            raise CheckpointError("the two vocabularies have no token in common")
        self._target_of = {mine: theirs for theirs, mine in self._draft_of.items()}
        self._num_target = num_target
        self._target_ids = torch.tensor(list(self._draft_of), dtype=torch.int64, device=device)
        self._draft_ids = torch.tensor(list(self._draft_of.values()), dtype=torch.int64, device=device)

    @property
    def num_shared(self) -> int:
        return len(self._draft_of)

    def target_of(self, token: int) -> int | None:
        """Of a token of the draft model."""
        return self._target_of.get(token)

    def draft_of(self, token: int) -> int:
        """Of a token that both have."""
        return self._draft_of[token]

    def of_target(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [R, num_draft] -> [R, num_target], -inf for tokens that the draft model has not, and
        float32 [R], the share of its chances that lies with tokens of both."""
        shared = logits.index_select(1, self._draft_ids)
        mapped = torch.full((logits.shape[0], self._num_target), float("-inf"), device=logits.device)
        mapped.index_copy_(1, self._target_ids, shared)
        return mapped, (shared.logsumexp(-1) - logits.logsumexp(-1)).exp_().nan_to_num_(0.0)
