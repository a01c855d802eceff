"""Bodies of the requests, each with the rules that concern it alone."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.wire.body import WireModel
from server.wire.fields import GenerationFields, TokenCount, TokenIds

TEXT_SCHEMA = {"type": "string"}
IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}}
PROMPT_SCHEMA = {
    "anyOf": [
        TEXT_SCHEMA,
        {"type": "array", "items": TEXT_SCHEMA},
        IDS_SCHEMA,
        {"type": "array", "items": IDS_SCHEMA},
    ]
}
PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": TEXT_SCHEMA},
    "required": ["type", "text"],
}
CONTENT_SCHEMA = {"anyOf": [TEXT_SCHEMA, {"type": "array", "items": PART_SCHEMA}, {"type": "null"}]}


class CompletionRequest(GenerationFields):
    # Kept as it came: lists of ids may be long, and `server.prompt_reader` checks them in one pass
    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)]
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: TokenCount | None = None


def _check_content(content: Any) -> Any:
    """A list of text parts is let through; whether it stays one is for the chat template."""
    if content is not None and not isinstance(content, str | list):
        raise ValueError("must be a string or a list of text parts")
    for position, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {position} is not a text part; this model reads text alone")
    return content


def _check_arguments(arguments: Any) -> Any:
    if arguments is not None and not isinstance(arguments, str | dict):
        raise ValueError("must be the text of a JSON object")
    return arguments


class FunctionCall(WireModel):
    name: str
    arguments: Annotated[Any, BeforeValidator(_check_arguments), WithJsonSchema(TEXT_SCHEMA)] = None


class ToolCall(WireModel):
    id: str | None = None
    function: FunctionCall


class ChatMessage(WireModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Any, BeforeValidator(_check_content), WithJsonSchema(CONTENT_SCHEMA)] = None
    tool_calls: list[ToolCall] | None = None


class ResponseFormat(WireModel):
    type: str


class ChatRequest(GenerationFields):
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ("add_special_tokens",)

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: TokenCount | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(WireModel):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(WireModel):
    model: str | None = None
    tokens: TokenIds
