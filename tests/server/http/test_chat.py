from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import MODEL, Running, running

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


@pytest.mark.parametrize(
    "choice", [{}, {"tool_choice": None}, {"tool_choice": "auto"}, {"tool_choice": "none"}], ids=str
)
def test_tools_may_be_there_and_the_text_is_the_answer(server: Running, choice: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "5"}]},
    ]
    answer = chat(server, max_tokens=1, tools=[tool], messages=messages, parallel_tool_calls=True, **choice)
    expected = b"user: hi\nassistant: \ntool: 5\nassistant: "
    assert bytes(server.engine.requests[-1].prompt_ids) == expected
    assert answer["choices"][0]["message"]["content"] == "a"
    assert answer["choices"][0]["finish_reason"] == "length"


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


def test_parts_of_characters_are_written_with_their_bytes() -> None:
    with running(FakeEngine(reply=lambda request, index: [*"…".encode()])) as server:
        asked = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
        choice = chat(server, **asked)["choices"][0]
        content = choice["logprobs"]["content"]
        assert choice["message"]["content"] == "…"
        assert [entry["token"] for entry in content] == ["\\xe2", "\\x80", "\\xa6"]
        assert bytes(byte for entry in content for byte in entry["bytes"]) == "…".encode()
        assert [top["token"] for top in content[0]["top_logprobs"]] == ["\\xe3", "\\xe4"]
        by_id = chat(server, return_tokens_as_token_ids=True, **asked)["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in by_id] == ["token_id:226", "token_id:128", "token_id:166"]
        assert [top["token"] for top in by_id[0]["top_logprobs"]] == ["token_id:227", "token_id:228"]
        assert [entry["bytes"] for entry in by_id] == [entry["bytes"] for entry in content]


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


ENDS = [
    {"max_tokens": 4},
    {"max_tokens": 9, "stop": "ef"},
    {"max_tokens": 9, "stop_token_ids": [ord("d")]},
    {"max_tokens": 9, "stop_token_ids": [ord("a")]},
    {"max_tokens": 1},
]


@pytest.mark.parametrize("end", ENDS, ids=str)
@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_the_end_brings_no_text_that_a_client_could_lose(end: dict[str, Any], tokens_per_step: int) -> None:
    """With everything in one step as well, and where a choice ends before it says anything."""
    asked = {**end, "n": 2, "stream": True, "return_token_ids": True}
    chats = {"messages": MESSAGES, "logprobs": True, **asked}
    texts = {"prompt": "x", "logprobs": 1, **asked}
    with running(FakeEngine(tokens_per_step=tokens_per_step)) as server:
        ended = set()
        for chunk in events(server, "/v1/chat/completions", chats)[:-1]:
            choice = json.loads(chunk)["choices"][0]
            assert choice["index"] not in ended
            if choice["finish_reason"] is not None:
                ended.add(choice["index"])
                assert choice["delta"] == {}
                assert choice["logprobs"] is None
                assert "token_ids" not in choice
        assert ended == {0, 1}
        whole = server.post("/v1/chat/completions", {**chats, "stream": False}).json()
        assert len(whole["choices"][0]["token_ids"]) == len(whole["choices"][0]["logprobs"]["content"])
        ids: dict[int, list[int]] = {0: [], 1: []}
        for chunk in events(server, "/v1/completions", texts)[:-1]:
            choice = json.loads(chunk)["choices"][0]
            if choice["finish_reason"] is not None:
                assert (choice["text"], choice["logprobs"]) == ("", None)
                assert "token_ids" not in choice
            else:
                ids[choice["index"]] += choice["token_ids"]
        whole = server.post("/v1/completions", {**texts, "stream": False}).json()
        assert [ids[0], ids[1]] == [choice["token_ids"] for choice in whole["choices"]]


def test_usage_in_every_chunk_for_who_asks(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True, "stream_options": options}
    chunks = [json.loads(chunk) for chunk in events(server, "/v1/chat/completions", body)[:-1]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 3
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"]["prompt_tokens"] == 20 for chunk in chunks)


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
