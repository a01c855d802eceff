"""Fields that completions and chat completions share: OpenAI's, and the extensions of open servers.

None means "not given" everywhere, as OpenAI's SDK sends null freely. Bounds that come from the
configuration or the model are checked in `server.sampling`, those of the API itself here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.wire import foreign_fields
from server.wire.body import WireModel
from server.wire.decoding import DecodingFields  # noqa: TC001 (pydantic reads the annotations)

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=INT32_MAX)]], Field(fail_fast=True)]
Strings = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)]
OneOrManyStrings = Annotated[
    Strings,
    BeforeValidator(_one_or_many),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
TokenCount = Annotated[int, Field(ge=0, le=INT32_MAX)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(WireModel):
    FOREIGN = foreign_fields.STREAM_OPTIONS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # in every chunk, not only in one of its own at the end


class GenerationFields(WireModel):
    model: str | None = None
    max_tokens: TokenCount | None = None
    n: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: OneOrManyStrings | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    # Extensions, named as in vLLM
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: TokenCount | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Strings | None = None
    allowed_token_ids: TokenIds | None = None
    prompt_logprobs: TokenCount | None = None
    priority: Annotated[int, Field(ge=INT32_MIN, le=INT32_MAX)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # in log-probabilities
    decoding: DecodingFields | None = None
