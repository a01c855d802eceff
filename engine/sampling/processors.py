"""What a request asks of its logits before a token is drawn: penalties, bias, bans.

In this order: repetition penalty (Keskar 2019), presence and frequency penalties (OpenAI), logit_bias,
then the bans (allowed_token_ids, bad_words, min_tokens), which nothing can lift again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from engine.sampling.places import Place
    from scheduler.types import SamplingParams

BANNED = float("-inf")


def needs_processing(place: Place) -> bool:
    params = place.params
    return bool(
        _penalised(params)
        or params.logit_bias
        or params.bad_words
        or params.allowed_token_ids is not None
        or place.number < params.min_tokens
    )


def process(logits: torch.Tensor, place: Place) -> None:
    """logits float32 [V] of one place, changed in place."""
    params = place.params
    if _penalised(params):
        _penalise(logits, place)
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits[_index(ids, logits)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
    if params.allowed_token_ids is not None:
        kept = torch.full_like(logits, BANNED)
        index = _index(params.allowed_token_ids, logits)
        kept[index] = logits[index]
        logits.copy_(kept)
    banned = _completing(place)
    if place.number < params.min_tokens:
        banned.extend(params.stop_token_ids)
    if banned:
        logits[_index(banned, logits)] = BANNED


def _penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )


def _penalise(logits: torch.Tensor, place: Place) -> None:
    params = place.params
    if params.repetition_penalty != 1.0:
        seen = _index(sorted(set(place.history())), logits)
        values = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    output = place.output()
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(_index(output, logits), minlength=len(logits))
        logits -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts


def _completing(place: Place) -> list[int]:
    """Last tokens of the bad words whose beginnings the text ends with."""
    if not place.params.bad_words:
        return []
    output = place.output()
    banned = []
    for word in place.params.bad_words:
        head = list(word[:-1])
        if not head or output[-len(head) :] == head:
            banned.append(word[-1])
    return banned


def _index(ids: list[int] | tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=logits.device)
