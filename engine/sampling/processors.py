"""What a request asks of its logits before a token is drawn: penalties, bias, bans, a mask.

In this order: repetition penalty (Keskar 2019), presence and frequency penalties (OpenAI), logit_bias,
then the bans (allowed_token_ids, bad_words, min_tokens) and the mask, which nothing can lift again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from engine.sampling.masks import TokenMask
    from scheduler.types import SamplingParams, Sequence

BANNED = float("-inf")


class MaskFailed(Exception):
    """A request's mask has raised: what it asks cannot be kept."""


class LogitsProcessor:
    """One sequence's, kept while it lives: what does not change is made once, counts grow with its tokens."""

    def __init__(
        self, sequence: Sequence, vocab_size: int, device: torch.device, mask: TokenMask | None = None
    ) -> None:
        params = sequence.request.sampling
        self.sequence = sequence
        self.params = params
        self.device = device
        self.mask = mask
        self._bias = torch.zeros(0)
        if params.logit_bias:
            biases = dict(params.logit_bias)  # each token once: of equal ones a device may write any
            self._bias = torch.zeros(vocab_size, device=device)
            self._bias[self._index(tuple(biases))] = torch.tensor(
                tuple(biases.values()), dtype=torch.float32, device=device
            )
        self._forbidden = torch.zeros(0, dtype=torch.bool)
        if params.allowed_token_ids is not None:
            self._forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
            self._forbidden[self._index(params.allowed_token_ids)] = False
        # bad words by their last token but one, which must be the text's last; None = a single token
        self._bad_words: dict[int | None, list[tuple[int, ...]]] = {}
        for word in params.bad_words:
            self._bad_words.setdefault(word[-2] if len(word) > 1 else None, []).append(word)
        self._longest_bad_word = max(map(len, params.bad_words), default=0)
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._seen = torch.zeros(0, dtype=torch.bool)
        self._num_counted = 0
        if penalised(params):
            self._counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[self._index(sequence.request.prompt_ids)] = True

    def apply(self, logits: torch.Tensor, drafted: tuple[int, ...]) -> None:
        """logits float32 [V], changed in place; `drafted` stand after the committed tokens."""
        if penalised(self.params):
            self._penalise(logits, drafted)
        if self._bias.numel():
            logits += self._bias
        if self._forbidden.numel():
            logits.masked_fill_(self._forbidden, BANNED)
        banned = self._completing(drafted) if self._bad_words else []
        if self.sequence.num_output + len(drafted) < self.params.min_tokens:
            banned.extend(self.params.stop_token_ids)
        if banned:
            logits[self._index(banned)] = BANNED
        allowed = self._allowed(drafted)
        if allowed is not None:
            logits.masked_fill_(~allowed.to(self.device), BANNED)

    def catch_up(self) -> None:
        """Count what was committed since. Until more is, whoever applies this changes nothing in it, and
        several threads may."""
        new = self.sequence.tokens[self.sequence.prompt_len + self._num_counted :]
        if new and penalised(self.params):
            self._count(self._counts, self._seen, new)
            self._num_counted += len(new)

    def _penalise(self, logits: torch.Tensor, drafted: tuple[int, ...]) -> None:
        self.catch_up()
        params = self.params
        counts, seen = self._counts, self._seen
        if drafted:
            counts, seen = counts.clone(), seen.clone()
            self._count(counts, seen, drafted)
        if params.repetition_penalty != 1.0:
            factor = params.repetition_penalty
            penalty = torch.where(logits > 0, logits / factor, logits * factor)
            logits.copy_(torch.where(seen, penalty, logits))
        if params.presence_penalty or params.frequency_penalty:
            logits -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts

    def _count(self, counts: torch.Tensor, seen: torch.Tensor, tokens: list[int] | tuple[int, ...]) -> None:
        if tokens:
            index = self._index(tokens)
            ones = torch.ones_like(index)
            seen[index] = True
            counts.index_add_(0, index, ones)  # last: where anything fails, nothing has been counted

    def _allowed(self, drafted: tuple[int, ...]) -> torch.Tensor | None:
        if self.mask is None:
            return None
        try:
            return self.mask.allowed(drafted)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as failure:  # it is code of others
            raise MaskFailed(str(failure)) from failure

    def _completing(self, drafted: tuple[int, ...]) -> list[int]:
        """Last tokens of the bad words whose beginnings the output ends with."""
        begin = max(self.sequence.prompt_len, len(self.sequence.tokens) - self._longest_bad_word)
        tail = (*self.sequence.tokens[begin:], *drafted)
        candidates = self._bad_words.get(None, []) + (self._bad_words.get(tail[-1], []) if tail else [])
        return [word[-1] for word in candidates if len(word) == 1 or tail[-len(word) + 1 :] == word[:-1]]

    def _index(self, ids: list[int] | tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


def penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )


def needs_processing(params: SamplingParams) -> bool:
    return bool(
        penalised(params)
        or params.logit_bias
        or params.bad_words
        or params.allowed_token_ids is not None
        or params.min_tokens
    )
