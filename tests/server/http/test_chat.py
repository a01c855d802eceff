from __future__ import annotations

import json

import pytest

from tests.server.http.conftest import MODEL, Running

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(server: Running, **body: object) -> dict:  # type: ignore[type-arg]
    response = server.post("/v1/chat/completions", {"messages": MESSAGES, **body})
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def events(server: Running, path: str, body: dict) -> list[str]:  # type: ignore[type-arg]
    with server.client() as client, client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        blocks = "".join(response.iter_text()).split("\n\n")
    assert blocks.pop() == ""
    return [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]


def test_answer_has_openai_shape(server: Running) -> None:
    answer = chat(server, max_tokens=3)
    assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "abc", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert bytes(server.engine.requests[-1].prompt_ids) == b"user: hi\nassistant: "


def test_default_fills_the_context(server: Running) -> None:
    prompt_len = len(b"user: hi\nassistant: ")
    assert chat(server)["usage"]["completion_tokens"] == server.engine.max_model_len - prompt_len


def test_max_completion_tokens_wins(server: Running) -> None:
    assert chat(server, max_tokens=9, max_completion_tokens=2)["choices"][0]["message"]["content"] == "ab"


def test_text_parts_and_developer_role(server: Running) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    chat(server, messages=messages, max_tokens=1)
    assert bytes(server.engine.requests[-1].prompt_ids) == b"system: be\nuser: one\ntwo\nassistant: "


def test_harmless_tool_fields_are_accepted(server: Running) -> None:
    chat(server, max_tokens=1, tools=[], tool_choice="none", response_format={"type": "text"})


def test_tools_are_shown_where_no_call_is_expected(server: Running) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "5"}]},
    ]
    chat(server, max_tokens=1, tools=[tool], tool_choice="none", messages=messages)
    expected = b"user: hi\nassistant: \ntool: 5\nassistant: "
    assert bytes(server.engine.requests[-1].prompt_ids) == expected


def test_logprobs(server: Running) -> None:
    choice = chat(server, max_tokens=1, logprobs=True, top_logprobs=2)["choices"][0]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "a",
                "logprob": -0.1,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "b", "logprob": -0.05, "bytes": [98]},
                    {"token": "c", "logprob": -1.05, "bytes": [99]},
                ],
            }
        ],
        "refusal": None,
    }


def test_stream_says_role_text_finish_usage_done(server: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = events(server, "/v1/chat/completions", body)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert parsed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in parsed[:-1]) == "abc"
    assert [chunk["choices"][0]["finish_reason"] for chunk in parsed[:-1]][-2:] == [None, "length"]
    assert parsed[-2]["choices"][0]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in parsed[:-1])
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["completion_tokens"] == 3
    assert len({chunk["id"] for chunk in parsed}) == 1


def test_stream_without_usage_says_nothing_of_it(server: Running) -> None:
    *chunks, _ = events(
        server, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stream": True}
    )
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


@pytest.mark.parametrize("stop", [None, "ef", "xyzq"])
@pytest.mark.parametrize("echo", [False, True])
def test_streamed_equals_whole(server: Running, stop: str | None, echo: bool) -> None:
    body = {"prompt": ["p", "qq"], "n": 2, "max_tokens": 12, "stop": stop, "logprobs": 1, "echo": echo}
    whole = {choice["index"]: choice for choice in server.post("/v1/completions", body).json()["choices"]}
    texts = dict.fromkeys(whole, "")
    tokens: dict[int, list[str]] = {index: [] for index in whole}
    offsets: dict[int, list[int]] = {index: [] for index in whole}
    finishes = {}
    for chunk in events(server, "/v1/completions", {**body, "stream": True})[:-1]:
        choice = json.loads(chunk)["choices"][0]
        assert choice["index"] not in finishes
        if choice["finish_reason"]:
            assert (choice["text"], choice["logprobs"]) == ("", None)
            finishes[choice["index"]] = choice["finish_reason"]
            continue
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"]
        offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    for index, choice in whole.items():
        assert texts[index] == choice["text"]
        assert tokens[index] == choice["logprobs"]["tokens"]
        assert offsets[index] == choice["logprobs"]["text_offset"]
        assert finishes[index] == choice["finish_reason"]
