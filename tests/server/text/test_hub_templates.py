"""Templates in the style of published families: the same text as transformers' own rendering of the messages
as its users write them, for messages as OpenAI's clients send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import locate
from server.prompt import ChatTemplate, ChatTemplates, TemplateError, TemplateLimits
from server.tokenizer import Tokenizer

FOLDER = Path(__file__).with_name("templates")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": " Be brief. /no_think "}
USER = {"role": "user", "content": " Wie spät ist es in 東京? 🙂 <b>'\"</b> "}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is late. "}
ARGUMENTS = {"city": "東京", "days": [1, 2], "unit": {"kind": "C", "exact": True}}
CALL = {"id": "call12345", "type": "function", "function": {"name": "clock", "arguments": ARGUMENTS}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "clock", "content": '{"time": "ü"}'}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "Tells the time – everywhere.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Größe <egal>"},
                    "unit": {"type": ["string", "null"]},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "zone": {"type": "string", "enum": ["utc", "local"]},
                },
                "required": ["city"],
            },
        },
    }
]
DOCUMENTS = [{"title": "Clocks", "text": "They tick."}, {"title": "Uhren", "text": "Tick – tack."}]
CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "rounds": [USER, ANSWER, USER],
    "answered": [SYSTEM, USER, ANSWER],
    "tools": [SYSTEM, USER, CALLING, RESULT, ANSWER, USER],
    "result": [USER, CALLING, RESULT],
}
STYLES = {
    "llama3": ("one", "system", "rounds", "answered", "tools", "result"),
    "qwen3": ("one", "system", "rounds", "answered", "tools", "result"),
    "mistral": ("one", "system", "rounds", "answered", "tools", "result"),
    "gemma2": ("one", "rounds"),
    "gemma3": ("one", "system", "rounds", "answered"),
    "phi3": ("one", "system", "rounds", "answered"),
    "smollm3": ("one", "system", "rounds", "answered", "tools", "result"),
    "gpt_oss": ("one", "system", "rounds", "answered", "tools", "result"),
    "hermes_tool_use": ("tools", "result"),
    "command_r_rag": ("one", "system", "rounds"),
}
VARIABLES: dict[str, dict[str, Any]] = {
    "llama3": {"date_string": "1 Jan 2024"},
    "qwen3": {"enable_thinking": False},
    "smollm3": {"enable_thinking": False},
    "gpt_oss": {"reasoning_effort": "high"},
    "command_r_rag": {"citation_mode": "fast"},
}


def source(style: str) -> str:
    return (FOLDER / f"{style}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def templates() -> Iterator[dict[str, ChatTemplates]]:
    made = {style: ChatTemplates({"default": ChatTemplate(source(style), SPECIAL)}) for style in STYLES}
    yield made
    for template in made.values():
        template.close()


def as_clients_send(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as JSON text, absent content as null, fields that an answer has as null."""
    return [
        message | {"content": message["content"] or None, "refusal": None, "tool_calls": calls or None}
        for message in messages
        for calls in [[as_sent(call) for call in message.get("tool_calls", ())]]
    ]


def as_sent(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"])}}


@pytest.mark.parametrize(("style", "chat"), [(style, chat) for style, of in STYLES.items() for chat in of])
@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("varied", [True, False])
def test_the_text_is_that_of_transformers(
    templates: dict[str, ChatTemplates], smollm2: Tokenizer, style: str, chat: str, begin: bool, varied: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = VARIABLES.get(style, {}) if varied else {}
    options: dict[str, Any] = {
        "tools": TOOLS if chat in ("tools", "result") else None,
        "documents": DOCUMENTS if style == "command_r_rag" else None,
        "add_generation_prompt": begin,
    }
    (expected,), _ = render_jinja_template(
        [CHATS[chat]], chat_template=source(style), **options, **SPECIAL, **variables
    )
    text, ids = templates[style].encode(smollm2, as_clients_send(CHATS[chat]), **options, kwargs=variables)
    assert text == expected
    assert ids == smollm2.encode_masked(text, {})


@pytest.mark.parametrize(
    ("style", "messages", "why"),
    [
        ("gemma2", [SYSTEM, USER], "System role not supported"),
        ("gemma2", [USER, USER], "roles must alternate"),
        ("mistral", [USER, USER], "must alternate"),
        ("mistral", [USER, {**CALLING, "tool_calls": [{**CALL, "id": "1"}]}], "nine characters"),
        ("llama3", [USER, {**CALLING, "tool_calls": [CALL, CALL]}], "one call at a time"),
        ("gpt_oss", [USER, RESULT], "a result without a call"),
    ],
)
def test_a_template_says_why_not(
    templates: dict[str, ChatTemplates], smollm2: Tokenizer, style: str, messages: list[Any], why: str
) -> None:
    with pytest.raises(TemplateError, match=why):
        templates[style].encode(smollm2, messages)


def rendered(name: str, smollm2: Tokenizer, messages: list[Any], **options: Any) -> str:
    templates = ChatTemplates({"default": ChatTemplate(source(name), SPECIAL)})
    try:
        return templates.encode(smollm2, messages, **options)[0]
    finally:
        templates.close()


PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": " two"}]


def test_parts_are_joined_where_the_template_wants_strings(smollm2: Tokenizer) -> None:
    shown = rendered("qwen3", smollm2, [{"role": "user", "content": PARTS}], add_generation_prompt=False)
    assert shown == "<|im_start|>user\none \n two<|im_end|>\n"


def test_parts_are_kept_where_the_template_takes_them(smollm2: Tokenizer) -> None:
    shown = rendered("gemma3", smollm2, [{"role": "user", "content": PARTS}], add_generation_prompt=False)
    assert shown == "<s><start_of_turn>user\nonetwo<end_of_turn>\n"


def test_strings_become_parts_where_the_template_wants_nothing_else(smollm2: Tokenizer) -> None:
    messages = [
        USER | {"content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "skip"}, *PARTS]},
    ]
    shown = rendered("parts_only", smollm2, messages)
    assert shown == "<|user|>\nhi\n<|assistant|>\none \n two\n<|assistant|>"


def test_arguments_stay_text_where_the_template_adds_them_to_text(smollm2: Tokenizer) -> None:
    calls = [as_sent(CALL), CALL, {"type": "function", "function": {"name": "now"}}]
    shown = rendered(
        "arguments_as_text", smollm2, [USER | {"content": "a"}, {**CALLING, "tool_calls": calls}]
    )
    as_object = json.dumps(ARGUMENTS, ensure_ascii=False)
    texts = [
        "<user>a<assistant>function clock",
        json.dumps(ARGUMENTS),
        "function clock",
        as_object,
        "function now",
        "{}",
    ]
    assert shown.splitlines() == texts


@pytest.mark.parametrize(
    "arguments", ["no JSON", "[1]", '{"a":' * 100 + "1" + "}" * 100, "[" * 100_000, "1" * 9999]
)
def test_arguments_that_are_no_object_stay_what_the_model_wrote(smollm2: Tokenizer, arguments: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    shown = rendered("qwen3", smollm2, [USER, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert f'"arguments": {arguments}}}' in shown


def test_no_arguments_are_an_empty_object(smollm2: Tokenizer) -> None:
    for empty in ("", " ", None, "{}"):
        call = {"type": "function", "function": {"name": "f", "arguments": empty}}
        shown = rendered("llama3", smollm2, [USER, {"role": "assistant", "tool_calls": [call]}])
        assert '"parameters": {}}' in shown


def test_the_developer_is_the_system_where_the_template_knows_no_other(smollm2: Tokenizer) -> None:
    developer = SYSTEM | {"role": "developer", "content": "Be kind."}
    assert "<|im_start|>system\nBe kind.<|im_end|>" in rendered("qwen3", smollm2, [developer, USER])
    assert "<|start|>developer<|message|># Instructions\n\nBe kind." in rendered(
        "gpt_oss", smollm2, [developer, USER]
    )


def test_a_thought_is_found_by_whatever_name(smollm2: Tokenizer) -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        for style, expected in (("qwen3", "<think>\nwell\n</think>"), ("gpt_oss", "analysis<|message|>well")):
            assert expected in rendered(style, smollm2, [USER, CALLING | {name: "well"}])


def test_the_template_is_picked_by_what_the_request_has(smollm2: Tokenizer) -> None:
    named = {name: ChatTemplate("{# documents #}" + name) for name in ("default", "tool_use", "rag")}
    templates = ChatTemplates(named)
    assert templates.encode(smollm2, [USER])[0] == "default"
    assert templates.encode(smollm2, [USER], tools=TOOLS, documents=DOCUMENTS)[0] == "tool_use"
    assert templates.encode(smollm2, [USER], documents=DOCUMENTS)[0] == "rag"
    templates.close()
    alone = ChatTemplates({"rag": ChatTemplate("{# documents #}rag")})
    with pytest.raises(TemplateError, match="the model has rag"):
        alone.encode(smollm2, [USER])
    assert alone.encode(smollm2, [USER], tools=TOOLS, documents=DOCUMENTS)[0] == "rag"
    alone.close()


def test_the_beginning_is_not_written_twice(smollm2_gguf: Path) -> None:
    checkpoint = replace(locate(str(smollm2_gguf)), add_bos=True)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    templates = ChatTemplates({"default": ChatTemplate("{{ bos_token }}x", checkpoint.special_tokens)})
    text, ids = templates.encode(tokenizer, [USER])
    templates.close()
    assert ids.count(checkpoint.bos_token_id or 0) == 1
    assert tokenizer.encode_prompt(text) == ids == tokenizer.encode_prompt("x")


def test_arguments_cannot_spell_special_tokens(smollm2: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"<|im_end|>": "<|im_end|>"}'}}
    templates = ChatTemplates({"default": ChatTemplate(source("qwen3"), SPECIAL)})
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text, ids = templates.encode(smollm2, messages, add_generation_prompt=False)
    templates.close()
    assert text.count("<|im_end|>") == 4
    assert ids.count(2) == 2


def test_a_template_that_is_slow_when_tried_is_a_usual_one(smollm2: Tokenizer) -> None:
    slow = (
        "{% if 'octavo' in messages | string %}{% for a in range(9999) %}{{ range(99999) | sum }}{% endfor %}"
        "{% endif %}"
        "{{ messages[0].content }}"
    )
    templates = ChatTemplates({"default": ChatTemplate(slow, SPECIAL, TemplateLimits(timeout_s=0.3))})
    assert templates.encode(smollm2, [{"role": "user", "content": PARTS}])[0] == "one \n two"
    templates.close()
