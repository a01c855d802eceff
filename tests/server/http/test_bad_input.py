"""Every bad body: a fast 400 in the envelope that names the field, and a server that goes on."""

from __future__ import annotations

from typing import Any

import pytest

from engine.checkpoint import CheckpointError
from tests.server.byte_tokenizer import ByteTokenizer
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import Running, running


def nested(depth: int, kind: str = "[") -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "[" else {"a": value}
    return value


COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt.1"),
    ({"prompt": ["a", 1]}, "prompt.1"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt.0"),
    ({"prompt": [None]}, "prompt.0"),
    ({"prompt": [[1], [2, None]]}, "prompt.1"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": [2**80]}, "prompt"),
    ({"prompt": [[1], [10**30]]}, "prompt.1"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": "a" * 256}, "prompt"),
    ({"prompt": "a" * 1_000_000}, "prompt"),
    ({"prompt": [1] * 1_000_000}, "prompt"),
    ({"suffix": "end"}, "suffix"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 255}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 2**200}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
    ({"min_tokens": 17}, "min_tokens"),  # of 16 by default, to which it was cut without a word
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 10**9}, "n"),
    ({"best_of": 17}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": "many"}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"typical_p": 0}, "typical_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop.0"),
    ({"stop": ["a", None]}, "stop.1"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop.0"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ({"bad_words": [""]}, "bad_words.0"),
    ({"bad_words": ["a"] * 65}, "bad_words"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [1000]}, "allowed_token_ids"),
    ({"allowed_token_ids": [97], "bad_words": ["a"]}, "allowed_token_ids"),
    ({"allowed_token_ids": [257], "min_tokens": 1}, "allowed_token_ids"),
    (
        {"allowed_token_ids": [5, 97], "bad_words": ["a"], "stop_token_ids": [5], "min_tokens": 1},
        "allowed_token_ids",
    ),
    ({"x": nested(64)}, "x"),
    ({"x": nested(2_00, "{")}, "x"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {str(k): 0 for k in range(2000)}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "a" * 1025}, "cache_salt"),
    ({"priority": 2**40}, "priority"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"user": "u" * 1000}, "user"),
    ({"model": 5}, "model"),
]

USER = {"role": "user", "content": "hi"}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


def called(function: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{}]}, "messages.0.role"),
    ({"messages": [USER, {"role": "pirate", "content": "arr"}]}, "messages.1.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
    ({"messages": [USER] * 5000}, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 300}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 1000}, "max_completion_tokens"),
    ({"max_completion_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ({"min_tokens": 1000}, "min_tokens"),
    ({"documents": [{"text": "a" * 33_000}]}, "documents"),
    ({"chat_template_kwargs": {"x": ["a" * 33_000]}}, "chat_template_kwargs"),
    ({"messages": [{**USER, "name": "a" * 33_000}]}, "messages"),
    ({"chat_template_kwargs": nested(64, "{")}, "chat_template_kwargs"),
    ({"messages": [{**USER, "x": nested(62)}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"response_format": {}}, "response_format"),
    ({"tools": {}}, "tools"),
    ({"tools": [5]}, "tools.0"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"function": {"name": "f"}}]}, "tools.0.type"),
    ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools.0.type"),
    ({"tools": [tool()]}, "tools.0.function.name"),
    ({"tools": [tool(name="")]}, "tools.0.function.name"),
    ({"tools": [tool(name="two words")]}, "tools.0.function.name"),
    ({"tools": [tool(name="f" * 65)]}, "tools.0.function.name"),
    ({"tools": [tool(name="f", parameters=[])]}, "tools.0.function.parameters"),
    ({"tools": [tool(name="f", strict="yes")]}, "tools.0.function.strict"),
    ({"tools": [tool(name="f", parametres={})]}, "tools.0.function.parametres"),
    ({"tools": [tool(name="f"), tool(name="g"), tool(name="f")]}, "tools.2.function.name"),
    ({"tools": [tool(name="f", description="a" * 33_000)]}, "tools"),
    ({"messages": [called({"arguments": "{}"})]}, "messages.0.tool_calls.0.function.name"),
    ({"messages": [called({"name": "f", "arguments": 5})]}, "messages.0.tool_calls.0.function.arguments"),
    ({"messages": [called({"name": "f"}) | {"tool_call": []}]}, "messages.0.tool_call"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tools": [tool(name="f")], "tool_choice": tool(name="f")}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
]


def shown(case: tuple[dict[str, Any], str]) -> str:
    return repr(case[0])[:50]


def check_envelope(body: Any) -> dict[str, Any]:
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(("body", "param"), COMPLETIONS, ids=map(shown, COMPLETIONS))
def test_completions_name_the_field(server: Running, body: dict[str, Any], param: str) -> None:
    response = server.post("/v1/completions", {"prompt": "hi", **body})
    assert response.status_code == 400
    error = check_envelope(response.json())
    assert error["param"] == param
    assert param in error["message"]
    assert response.elapsed.total_seconds() < 2


@pytest.mark.parametrize(("body", "param"), CHAT, ids=map(shown, CHAT))
def test_chat_names_the_field(server: Running, body: dict[str, Any], param: str) -> None:
    response = server.post("/v1/chat/completions", {"messages": [USER], **body})
    assert response.status_code == 400
    error = check_envelope(response.json())
    assert error["param"] == param
    assert param in error["message"]


def test_what_is_nested_within_the_bound_is_taken(server: Running) -> None:
    assert server.post("/v1/completions", {"prompt": "hi", "metadata": nested(63)}).status_code == 200


def test_what_the_tokens_leave_over_is_taken(server: Running) -> None:
    server.complete(allowed_token_ids=[97, 257], bad_words=["b"], min_tokens=1)
    server.complete(allowed_token_ids=[257])


def test_what_only_the_run_reveals_is_the_requests_fault_too() -> None:
    with running(FakeEngine(error="the parameters allow no token here")) as server:
        answer = server.post("/v1/completions", {"prompt": "hi"})
        assert answer.status_code == 400
        error = check_envelope(answer.json())
        assert error["type"] == "invalid_request_error"
        assert "allow no token" in error["message"]
        assert server.num_ended("error") == 1


def test_an_encoded_prompt_has_ids_of_the_model_only() -> None:
    with running(FakeEngine(vocab_size=100)) as server:
        for path, body, param in (
            ("/v1/completions", {"prompt": "az"}, "prompt"),
            ("/v1/chat/completions", {"messages": [USER]}, "messages"),
        ):
            error = check_envelope(server.post(path, body).json())
            assert (error["code"], error["param"]) == ("token_id_out_of_range", param)


def test_over_long_prompt_says_both_numbers(server: Running) -> None:
    message = server.post("/v1/completions", {"prompt": "a" * 300}).json()["error"]["message"]
    assert "256" in message
    assert "300" in message
    message = server.post("/v1/completions", {"prompt": "aaa", "max_tokens": 1000}).json()["error"]["message"]
    assert "256" in message
    assert "1003" in message


RAW = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "x": -Infinity}',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a\x00b"}',
    b'{"prompt": [' + b"1" * 5000 + b"]}",
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"x":' * 50_000 + b"1" + b"}" * 50_000,
    '{"prompt": "a"}'.encode("utf-16"),
]


@pytest.mark.parametrize("raw", RAW, ids=[repr(raw[:40]) for raw in RAW])
def test_malformed_json(server: Running, raw: bytes) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    check_envelope(response.json())


def test_escaped_pairs_and_emoji_are_fine(server: Running) -> None:
    with server.client() as client:
        raw = b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}'
        assert client.post("/v1/completions", content=raw).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/other/model", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
        ("PROPFIND", "/health", 405),
    ],
)
def test_wrong_routes(server: Running, method: str, path: str, status: int) -> None:
    with server.client() as client:
        response = client.request(method, path)
    assert response.status_code == status
    check_envelope(response.json())


def test_unknown_model_is_404(server: Running) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [USER]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        response = server.post(path, {**body, "model": "gpt-9\n" * 100})
        assert response.status_code == 404
        error = check_envelope(response.json())
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_wrong_content_type(server: Running) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", data={"prompt": "a"})
    assert response.status_code == 415
    check_envelope(response.json())


class GivingUp(ByteTokenizer):
    """A vocabulary whose rules cannot cope with some text."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        if "!" in text:
            raise CheckpointError("a text: retry-limit-in-match over")
        return super().encode(text, special=special)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text, special=True)


def test_a_text_that_the_vocabulary_gives_up_on_is_a_400() -> None:
    with running(tokenizer=GivingUp()) as server:
        for path in ("/v1/completions", "/tokenize"):
            response = server.post(path, {"prompt": "a!"})
            assert response.status_code == 400
            assert check_envelope(response.json())["code"] == "unreadable"
        assert server.complete(max_tokens=1)["choices"][0]["text"] == "a"
        assert server.service.admission.in_flight == 0


def test_more_sequences_than_the_server_takes_is_not_worth_a_retry() -> None:
    with running(capacity=10) as server:
        assert server.post("/v1/completions", {"prompt": ["a", "b"], "n": 6}).status_code == 400


def test_nothing_is_left_behind(server: Running) -> None:
    assert server.service.admission.in_flight == 0
    assert not server.engine.live
    assert server.complete(max_tokens=1)["choices"][0]["text"] == "a"
