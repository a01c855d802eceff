"""Draft models for tests: tiny, random, and around them what a drafter needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cuda_kernels.ops import pick
from engine.drafting.draft_kv import DraftKV, DraftPiece
from engine.drafting.guess import ROOT, Guess
from engine.drafting.kinds import NUM_CHANCES, NUM_KINDS
from engine.drafting.models.draft_model import DraftModel
from engine.drafting.models.following import Following
from engine.drafting.models.pard import Pard
from engine.drafting.models.small_model import SmallModel
from engine.models.transformer import Transformer
from engine.sampling.places import Place
from engine.sampling.processors import LogitsProcessor, needs_processing
from engine.sampling.sampler import sample
from scheduler.types import Request, SamplingParams, Sequence
from tests.engine.tiny import CPU, TINY, random_weights

if TYPE_CHECKING:
    from engine.drafting.guess import Drafter
    from engine.drafting.standing import Standing
    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig

VOCAB = TINY.vocab_size


def transformer(config: TransformerConfig = TINY, seed: int = 0) -> Transformer:
    torch.set_num_threads(1)
    return Transformer(config, random_weights(config, seed), pick(CPU))


def draft_model(model: Transformer, num_pages: int = 64, max_seqs: int = 8, max_len: int = 512) -> DraftModel:
    kv = DraftKV(model.config, model.ops, num_pages, 16, max_len + 64, max_seqs, torch.float32, CPU)
    return DraftModel(model, kv, VOCAB, processor_of)


def following(draft: DraftModel, max_len: int = 512) -> Following:
    return Following(draft.kv, max_len, draft.model.config.vocab_size)


def small_model(model: Transformer, cost: float = 0.1, max_len: int = 512, **sizes: int) -> SmallModel:
    draft = draft_model(model, max_len=max_len, **sizes)
    return SmallModel(draft, following(draft, max_len), cost)


def pard(model: Transformer, mask_token: int) -> Pard:
    draft = draft_model(model)
    return Pard(draft, following(draft), mask_token)


def sequence(tokens: list[int], seq_id: int = 1, num_output: int = 0, **params: object) -> Sequence:
    sampling = SamplingParams(**({"temperature": 0.0, "seed": seq_id} | params))  # type: ignore[arg-type]
    prompt = tokens[: len(tokens) - num_output]
    request = Request(request_id=f"r{seq_id}", prompt_ids=tuple(prompt), sampling=sampling)
    return Sequence(seq_id, request, 0, list(tokens))


def processor_of(sequence: Sequence) -> LogitsProcessor | None:
    if not needs_processing(sequence.request.sampling):
        return None
    return LogitsProcessor(sequence, VOCAB, CPU)


def plain_logits(model: Transformer, tokens: list[int] | tuple[int, ...], count: int = 1) -> torch.Tensor:
    """Of the last `count` tokens, computed alone and at once: float32 [count, V]"""
    draft = draft_model(model)
    with torch.inference_mode():
        piece = DraftPiece(1, tuple(tokens), range(len(tokens)), 0, count)
        return model.forward(draft.kv.rows([piece]), draft.kv.storage)


def next_tokens(model: Transformer, sequence: Sequence, count: int) -> list[int]:
    """What plain decoding with the model goes on with."""
    drafted: tuple[int, ...] = ()
    for _ in range(count):
        logits = plain_logits(model, [*sequence.tokens, *drafted])
        drawn = sample(logits, [Place(sequence, drafted, processor_of(sequence))])
        drafted = (*drafted, drawn.tokens[0])
    return list(drafted)


def paths(guess: Guess) -> list[tuple[int, ...]]:
    """Of each draft the tokens up to it; what a guess must never be is asserted on the way."""
    found: list[tuple[int, ...]] = []
    for k, (token, parent) in enumerate(zip(guess.tokens, guess.parents, strict=True)):
        assert ROOT <= parent < k
        assert 0 <= token < VOCAB
        found.append((*(found[parent] if parent != ROOT else ()), token))
    assert len(set(found)) == len(found), "siblings are alike"
    assert len(guess.kinds) == len(guess.beliefs) == len(guess.tokens)
    return found


def drafts_stood(standing: Standing, *, drawn: bool) -> tuple[float, float]:
    """Of the first choices for their places, behind drafts that stood: how many stood, of how many."""
    first = NUM_KINDS * drawn
    kinds = standing._seen.keys() & set(range(first, first + NUM_CHANCES))
    return sum(standing._stood[k] for k in kinds), sum(standing._seen[k] for k in kinds)


def beside(around: Surroundings, model: Transformer, free_bytes: int = 2**26) -> tuple[DraftModel, Following]:
    """What `load_draft_model` makes, of a model that comes from no files."""
    kv = DraftKV.beside(around, model.config, free_bytes)
    draft = DraftModel(model, kv, around.model.config.vocab_size, around.processor_of)
    return draft, Following(kv, around.max_model_len, model.config.vocab_size)


def own_model(around: Surroundings) -> dict[str, Drafter]:
    """The target itself drafts."""
    return {"model": SmallModel(*beside(around, around.model), cost=0.1)}


def random_models(around: Surroundings) -> dict[str, Drafter]:
    """Models that know nothing of the target."""
    return {
        "model": SmallModel(*beside(around, transformer(seed=8)), cost=0.02),
        "pard": Pard(*beside(around, transformer(seed=9)), mask_token=3),
    }
