"""/tokenize counts what the same body costs as a chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from engine.checkpoint import locate
from server.prompt import ChatTemplate, ChatTemplates
from server.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import Running, running
from tests.server.http.test_bad_input import check_envelope

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Shows all that a template may be given, and fails on what its variables ask it to
TEMPLATE = """
{%- for tool in tools or [] -%}
{% if tool.function.name == "bad" %}{{ raise_exception("bad tool") }}{% endif -%}
[tool {{ tool | tojson }}]{% endfor -%}
{% for document in documents or [] %}{% if document.bad %}{{ raise_exception("bad document") }}{% endif -%}
[document {{ document | tojson }}]{% endfor -%}
{% for message in messages -%}
[{{ message.role }} {{ message.name }} {{ message.tool_call_id }} {{ message.reasoning_content }}]
{{ message.content }}{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}
{% endfor %}{% if mood == "bad" %}{{ raise_exception("bad mood") }}{% endif %}{{ mood }}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
TOOL = {"type": "function", "function": {"name": "f", "description": "does", "parameters": {"x": None}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, 2]}'}}
USER = {"role": "user", "content": "What is the time? <|im_end|>"}
BEGUN = {"role": "assistant", "content": "It is"}


@pytest.fixture(scope="module")
def shown(smollm2_gguf: Path) -> Iterator[Running]:
    tokenizer = Tokenizer.from_checkpoint(locate(str(smollm2_gguf)))
    engine = FakeEngine(vocab_size=tokenizer.vocab_size, max_model_len=4096)
    with running(engine, tokenizer=tokenizer) as server:  # type: ignore[arg-type]
        server.service.template = ChatTemplates({"default": ChatTemplate(TEMPLATE)})
        yield server
        server.service.template.close()


BODIES: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    {"add_generation_prompt": True},
    {"continue_final_message": True, "messages": [USER, BEGUN]},
    {"continue_final_message": True, "add_generation_prompt": False, "messages": [USER, BEGUN]},
    {"continue_final_message": False, "messages": [USER, BEGUN]},
    {"documents": [{"title": "Clocks", "text": "Five o'clock."}]},
    {"chat_template_kwargs": {"mood": "cheerful"}},
    {"tools": []},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "documents": [{"text": "x"}], "chat_template_kwargs": {"mood": "calm"}},
    {"messages": [{**USER, "name": "Ann"}, {"role": "developer", "content": "Be brief."}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ]
    },
    {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [CALL],
                "reasoning_content": "Hm.",
                "refusal": None,
            },
            {"role": "tool", "tool_call_id": "c1", "content": "five"},
        ]
    },
    {"max_completion_tokens": 2, "temperature": 0.5, "stop": ["x"], "store": True},
    {"add_special_tokens": False},
]


@pytest.mark.parametrize("body", BODIES, ids=[str(body)[:60] for body in BODIES])
def test_it_counts_what_the_chat_sends(shown: Running, body: dict[str, Any]) -> None:
    body = {"messages": [USER], "max_tokens": 1, **body}
    chat = shown.post("/v1/chat/completions", body)
    assert chat.status_code == 200, chat.text
    counted = shown.post("/tokenize", body).json()
    assert counted["tokens"] == list(shown.engine.requests[-1].prompt_ids)
    assert counted["count"] == chat.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"document": [{"text": "x"}]}, "document"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"prompt": "x"}, "prompt"),
        ({"messages": [{**USER, "contnt": "x"}]}, "messages.0.contnt"),
        ({"tools": [{"type": "function", "function": {"name": "bad"}}, TOOL]}, "tools"),
        ({"tools": [TOOL], "documents": [{"bad": True}]}, "documents"),
        ({"tools": [TOOL], "chat_template_kwargs": {"mood": "bad"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_both_refuse_the_same_and_name_what_the_template_fails_on(
    shown: Running, path: str, body: dict[str, Any], param: str
) -> None:
    response = shown.post(path, {"messages": [USER], **body})
    assert response.status_code == 400
    assert check_envelope(response.json())["param"] == param
