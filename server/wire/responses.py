"""Bodies of the answers, as msgspec values: they are encoded once per token, so encoding must be cheap.

A field that is UNSET is left out; one that is None is sent as null, where OpenAI's SDK expects it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

encode = msgspec.json.Encoder().encode


class Answer(msgspec.Struct, gc=False):
    """Base of all."""


class CachedTokens(Answer, kw_only=True):
    cached_tokens: int


class PredictedTokens(Answer, kw_only=True):
    """Of speculative decoding: drafts that are in the text, and drafts that are not. `lossy`: the rule by
    which drafts stood that the model would not have drawn."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    lossy: str | UnsetType = UNSET


class LossyDecoding(Answer, kw_only=True):
    """In every answer and chunk whose text need not be the one of plain decoding."""

    method: str
    lossy: str


class Usage(Answer, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictedTokens | UnsetType = UNSET


# One entry per prompt token, the first null: token id -> {"logprob", "rank", "decoded_token"}
PromptLogprobs = list[dict[str, dict[str, Any]] | None]


class LegacyLogprobs(Answer, kw_only=True):
    """Logprobs of completions, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishWord = Literal["stop", "length"]  # those of OpenAI's that fit; SDKs may refuse any other


def finish_of(reason: str | None) -> tuple[FinishWord | None, str | UnsetType]:
    """Why a choice ended, as OpenAI says it, and the cause where that does not tell it."""
    match reason:
        case None | "stop" | "length":
            return reason, UNSET
        case _:  # it was cut off: by a deadline, or an abort
            return "length", reason


class CompletionChoice(Answer, kw_only=True):
    index: int
    text: str
    logprobs: LegacyLogprobs | None = None
    finish_reason: FinishWord | None = None
    finish_cause: str | UnsetType = UNSET
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Answer, kw_only=True):
    """Whole, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    decoding: LossyDecoding | UnsetType = UNSET
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(Answer, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Answer, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer, kw_only=True):
    content: list[TokenLogprob]
    refusal: None = None


class Message(Answer, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Delta(Answer, kw_only=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChoice(Answer, kw_only=True):
    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishWord
    finish_cause: str | UnsetType = UNSET
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChunkChoice(Answer, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishWord | None = None
    finish_cause: str | UnsetType = UNSET
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Answer, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    decoding: LossyDecoding | UnsetType = UNSET
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatChunk(Answer, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    decoding: LossyDecoding | UnsetType = UNSET
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Model(Answer, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "octavo"
    max_model_len: int


class ModelList(Answer, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(Answer, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Text(Answer, kw_only=True):
    prompt: str


class TokenizerInfo(Answer, kw_only=True):
    """Named as in Hugging Face's tokenizer_config.json, for clients that tokenise by way of this server."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    add_bos_token: bool
    chat_template: str | None
    model_max_length: int
    vocab_size: int


class ErrorDetail(Answer, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Answer, kw_only=True):
    error: ErrorDetail
