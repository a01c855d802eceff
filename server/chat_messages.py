"""Messages as OpenAI's clients send them, brought into the form that a chat template can show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

MAX_ARGUMENTS_DEPTH = 64
_ROLES = frozenset({"user", "system", "assistant", "tool"})
_SAME_CONTENT = {"developer": "system", "function": "tool"}  # roles whose content is shown as another's
_REASONING = ("reasoning_content", "reasoning", "thinking")  # what clients call it; templates know the first


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a template can show. The default is what most templates were written for."""

    string_roles: frozenset[str] = _ROLES  # whose content may be a string
    part_roles: frozenset[str] = frozenset()  # whose content may be a list of text parts
    object_arguments: bool = True  # of tool calls: an object; else its JSON text

    @classmethod
    def of(cls, found: dict[str, Any]) -> TemplateTraits:
        return cls(
            frozenset(found["string_roles"]), frozenset(found["part_roles"]), found["object_arguments"]
        )


def fit_messages(messages: list[Message], traits: TemplateTraits, *, developer: bool) -> list[Message]:
    """The messages as the template wants them. `developer`: it knows the role of this name.

    Fields that are null count as absent, for clients send whole answers back; content that is null is
    empty, for templates add it to other text.
    """
    return [_fit(message, traits, developer=developer) for message in messages]


def _fit(message: Message, traits: TemplateTraits, *, developer: bool) -> Message:
    fields = {name: value for name, value in message.items() if value is not None}
    fields["content"] = _content(fields, traits)
    if fields["role"] == "developer" and not developer:
        fields["role"] = "system"  # OpenAI renamed the role; most templates know it by its old name only
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    if "tool_calls" in fields:
        calls = [_call(call, traits) for call in fields.pop("tool_calls")]
        fields |= {"tool_calls": calls} if calls else {}
    return fields


def _content(message: Message, traits: TemplateTraits) -> str | list[Any]:
    content, role = message.get("content", ""), _SAME_CONTENT.get(message["role"], message["role"])
    takes_parts = role in traits.part_roles
    if isinstance(content, str):
        return (
            [{"type": "text", "text": content}]
            if takes_parts and role not in traits.string_roles
            else content
        )
    return content if takes_parts else "\n".join(part["text"] for part in content)


def _call(call: dict[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    """A tool call, whose arguments OpenAI's clients send as the text of a JSON object."""
    function = call["function"]
    arguments = function.get("arguments")
    if traits.object_arguments:
        arguments = _parsed(arguments) if isinstance(arguments, str) else arguments or {}
    elif not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _parsed(text: str) -> Any:
    """The object; a text that is none, or one too deep to be handed on, stays as it is."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) and _is_shallow(value) else text


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_ARGUMENTS_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
    return not level
