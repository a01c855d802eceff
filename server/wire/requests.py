"""Bodies of the requests, each with the rules that concern it alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from server.wire import foreign_fields
from server.wire.body import WireModel, field_error
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
ARGUMENTS_SCHEMA = {"anyOf": [TEXT_SCHEMA, {"type": "object"}, {"type": "null"}]}
CHOICE_SCHEMA = {"enum": ["auto", "none", None]}
OBJECTS_SCHEMA = {"type": "array", "items": {"type": "object"}}
SHOWN_TOOLS_SCHEMA = {"anyOf": [TEXT_SCHEMA, OBJECTS_SCHEMA, {"type": "null"}]}


class CompletionRequest(GenerationFields):
    FOREIGN = foreign_fields.COMPLETION

    # Kept as it came: lists of ids may be long, and `server.prompt_reader` checks them in one pass
    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)]
    add_special_tokens: bool | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: TokenCount | None = None


def _check_kind(kind: Any) -> Any:
    if kind != "text":
        raise ValueError("must be 'text': this model reads text alone")
    return kind


class TextPart(WireModel):
    FOREIGN = foreign_fields.PART

    type: Annotated[Literal["text"], BeforeValidator(_check_kind)]
    text: str


def _text_or_parts(content: Any, parts: Any) -> Any:
    """A list of text parts is let through; whether it stays one is for the chat template."""
    if content is not None and not isinstance(content, str | list):
        raise ValueError("must be a string or a list of text parts")
    return parts(content) if isinstance(content, list) else content


def _check_arguments(arguments: Any) -> Any:
    if arguments is not None and not isinstance(arguments, str | dict):
        raise ValueError("must be the text of a JSON object")
    return arguments


class CalledFunction(WireModel):
    FOREIGN = foreign_fields.CALLED_FUNCTION

    name: str
    arguments: Annotated[Any, BeforeValidator(_check_arguments), WithJsonSchema(ARGUMENTS_SCHEMA)] = None


class ToolCall(WireModel):
    FOREIGN = foreign_fields.TOOL_CALL

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


def _check_shown_tools(tools: Any) -> Any:
    are_objects = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if not (tools is None or isinstance(tools, str) or are_objects):
        raise ValueError("must be a list of tools, or their text")
    return tools


class ChatMessage(WireModel):
    """All that a chat template may be given of a message."""

    FOREIGN = foreign_fields.MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        SerializeAsAny[list[TextPart] | None], WrapValidator(_text_or_parts), WithJsonSchema(CONTENT_SCHEMA)
    ] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    # Some templates look for them in the system message
    tools: Annotated[Any, BeforeValidator(_check_shown_tools), WithJsonSchema(SHOWN_TOOLS_SCHEMA)] = None


class FunctionDefinition(WireModel):
    """`strict` binds calls alone, and none is parsed or forced yet: templates show it as it is."""

    FOREIGN = foreign_fields.FUNCTION

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]+$", max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    result: dict[str, Any] | None = Field(None, alias="return")  # transformers writes it of Python functions
    strict: bool | None = None


class Tool(WireModel):
    FOREIGN = foreign_fields.TOOL

    type: Literal["function"]
    function: FunctionDefinition


def _unique_names(tools: list[Tool] | None) -> list[Tool] | None:
    names: set[str] = set()
    for place, tool in enumerate(tools or ()):
        if tool.function.name in names:
            raise field_error(f"{place}.function.name", "two tools have this name")
        names.add(tool.function.name)
    return tools


def _check_choice(choice: Any) -> Any:
    if choice not in (None, "auto", "none"):
        raise ValueError('calls of tools cannot be forced yet: only "auto" and "none" are taken')
    return choice


class ChatRequest(GenerationFields):
    FOREIGN = foreign_fields.CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: TokenCount | None = None
    tools: Annotated[list[Tool] | None, AfterValidator(_unique_names)] = None
    # The text is the answer under either; calls in it are not parsed yet
    tool_choice: Annotated[Any, BeforeValidator(_check_choice), WithJsonSchema(CHOICE_SCHEMA)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_ending(self) -> Self:
        if self.add_generation_prompt and self.continue_final_message:
            message = "it and add_generation_prompt exclude each other"
            raise field_error("continue_final_message", message)
        return self


class TokenizeChatRequest(ChatRequest):
    """The body of a chat, as it is: what does not concern its prompt is checked, and has no effect."""

    return_token_strs: bool | None = None


class TokenizeTextRequest(WireModel):
    FOREIGN = foreign_fields.TOKENIZE

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(WireModel):
    model: str | None = None
    tokens: TokenIds
