"""From a request's fields to SamplingParams: limits of the configuration and the model, then defaults."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from scheduler.types import SamplingParams
from server.errors import invalid
from server.prompt_reader import check_token_ids, context_exceeded

if TYPE_CHECKING:
    from collections.abc import Sized

    from server.config import ServerConfig
    from server.generation_defaults import GenerationDefaults
    from server.tokenizer import Tokenizer
    from server.wire.fields import GenerationFields

SEED_MASK = 2**64 - 1
MIN_TOP_P = 1e-6  # top_p of 0 means the likeliest token


def check_limits(body: GenerationFields, limits: ServerConfig, vocab_size: int) -> None:
    """Raise the 400 for what the limits or the vocabulary do not allow, or what contradicts itself."""
    _at_most("n", body.n, limits.max_choices)
    _at_most("prompt_logprobs", body.prompt_logprobs, limits.max_logprobs)
    _at_most_entries("stop", body.stop, limits.max_stop_strings)
    _at_most_entries("stop_token_ids", body.stop_token_ids, limits.max_stop_token_ids)
    _at_most_entries("bad_words", body.bad_words, limits.max_bad_words)
    _at_most_entries("logit_bias", body.logit_bias, limits.max_logit_bias)
    _at_most_entries("allowed_token_ids", body.allowed_token_ids, vocab_size)
    for name, words in (("stop", body.stop), ("bad_words", body.bad_words)):
        for position, word in enumerate(words or ()):
            if len(word) > limits.max_stop_chars:
                message = f"has {len(word)} characters; at most {limits.max_stop_chars} are taken"
                raise invalid(message, f"{name}.{position}")
    check_token_ids(body.stop_token_ids or (), vocab_size, "stop_token_ids")
    check_token_ids(body.allowed_token_ids or (), vocab_size, "allowed_token_ids")
    _biases(body, vocab_size)
    _check_contradictions(body)


def base_sampling(
    body: GenerationFields,
    defaults: GenerationDefaults,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Everything but max_tokens and the seed, which are each prompt's own. Tokenises bad_words: not for the
    loop."""
    eos_ids = () if body.ignore_eos else (token for token in defaults.eos_token_ids if token < vocab_size)
    stop_ids = (*eos_ids, *(body.stop_token_ids or ()))
    allowed = body.allowed_token_ids
    sampling = SamplingParams(
        temperature=_or(body.temperature, defaults.temperature),
        top_p=max(MIN_TOP_P, _or(body.top_p, defaults.top_p)),
        top_k=max(0, int(_or(body.top_k, defaults.top_k))),
        min_p=_or(body.min_p, defaults.min_p),
        typical_p=_or(body.typical_p, defaults.typical_p),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_biases(body, vocab_size),
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys(stop_ids)),
        bad_words=_bad_words(tokenizer, body.bad_words or [], vocab_size),
        allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    _check_some_token_is_left(sampling)
    return sampling


def seed_of_prompt(body: GenerationFields) -> int:
    """The one asked for, so that a prompt in a list gives what it gives alone; else each draws its own."""
    return secrets.randbits(64) if body.seed is None else body.seed & SEED_MASK


def fit_max_tokens(
    requested: int | None, default: int | None, prompt_len: int, max_model_len: int, param: str
) -> int:
    """Output tokens of one sequence. What was asked for must fit; a default is cut to what does."""
    room = max_model_len - prompt_len
    if requested is None:
        return room if default is None else min(default, room)
    if requested > room:
        raise context_exceeded(prompt_len, requested, max_model_len, param)
    return requested


def check_min_tokens(min_tokens: int, max_tokens: int, param: str) -> None:
    """`max_tokens` may be a default."""
    if min_tokens > max_tokens:
        raise invalid(f"min_tokens ({min_tokens}) is larger than {param} ({max_tokens}).", "min_tokens")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_some_token_is_left(sampling: SamplingParams) -> None:
    """What the run alone reveals, as bad words of several tokens, the engine refuses."""
    if sampling.allowed_token_ids is None:
        return
    left = set(sampling.allowed_token_ids) - {word[0] for word in sampling.bad_words if len(word) == 1}
    if not left:
        raise invalid("bad_words forbid every token of allowed_token_ids.", "allowed_token_ids")
    if sampling.min_tokens and not left.difference(sampling.stop_token_ids):
        message = (
            "min_tokens needs a token other than those that end the text, and allowed_token_ids has none."
        )
        raise invalid(message, "allowed_token_ids")


def _bad_words(tokenizer: Tokenizer, words: list[str], vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Each word as it follows something else and as it follows a space, which are different tokens; and where
    it spells special tokens, as those. A word with a token that the model does not have cannot occur."""
    spellings = (form for word in words for form in (word, " " + word.lstrip(" ")))
    encoded = [tuple(tokenizer.encode_within(form)) for form in spellings]
    marked = (tuple(tokenizer.encode(word, special=True)) for word in words)
    encoded += (ids for ids in marked if any(map(tokenizer.is_special, ids)))
    return tuple(dict.fromkeys(ids for ids in encoded if ids and max(ids) < vocab_size))


def _biases(body: GenerationFields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for key, bias in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid("logit_bias: keys must be token ids", "logit_bias")
        biases[int(key)] = bias
    check_token_ids(list(biases), vocab_size, "logit_bias")
    return tuple(sorted(biases.items()))


def _check_contradictions(body: GenerationFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true.", "stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs cannot be streamed.", "prompt_logprobs")
    if body.allowed_token_ids is not None and not body.allowed_token_ids:
        raise invalid("allowed_token_ids allows nothing.", "allowed_token_ids")


def _at_most(param: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise invalid(f"{param} is {value}; at most {limit} is taken.", param)


def _at_most_entries(param: str, value: Sized | None, limit: int) -> None:
    if value is not None and len(value) > limit:
        raise invalid(f"{param} has {len(value)} entries; at most {limit} are taken.", param)
