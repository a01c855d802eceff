from __future__ import annotations

import openai
from calls import (
    ANSWER,
    CITY_SCHEMA,
    KEY,
    LARGE_PROMPT,
    LONG_TASK,
    MODEL,
    QUESTION,
    SYSTEM,
    TIMEOUT_S,
    TOO_LARGE_PROMPT,
    URL,
    WEATHER_TOOL,
    Calls,
    raises,
)
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret

MESSAGES = [ChatMessage.from_system(SYSTEM), ChatMessage.from_user(QUESTION)]
LONG = [ChatMessage.from_user(LONG_TASK)]
TOOL = Tool(**WEATHER_TOOL["function"], function=lambda city: city)
calls = Calls("haystack-ai")


def ask(messages=MESSAGES, model=MODEL, key=KEY, timeout=TIMEOUT_S, tools=None, on_chunk=None, **options):
    generator = OpenAIChatGenerator(
        api_key=Secret.from_token(key), api_base_url=URL, model=model, max_retries=0, timeout=timeout,
        tools=tools, streaming_callback=on_chunk,
    )  # fmt: skip
    return generator.run(messages, generation_kwargs={"max_tokens": 24, "temperature": 0, **options})[
        "replies"
    ]


@calls
def chat():
    (answer,) = ask()
    assert ANSWER in answer.text
    assert answer.meta["usage"]["completion_tokens"] > 0


@calls
def stream():
    pieces = []
    (answer,) = ask(on_chunk=lambda chunk: pieces.append(chunk.content))
    assert "".join(pieces) == answer.text == ask()[0].text


@calls
def logprobs():
    (answer,) = ask(logprobs=True, top_logprobs=3)
    assert all(len(token["top_logprobs"]) == 3 for token in answer.meta["logprobs"]["content"])


@calls
def n():
    assert len({answer.text for answer in ask(LONG, n=3, seed=1, temperature=1)}) == 3


@calls
def stop():
    assert ask(stop=[" is"])[0].text == "The capital of France"


@calls
def seed():
    texts = [ask(LONG, seed=seed, temperature=1)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@calls
def stream_usage():
    (answer,) = ask(on_chunk=lambda _: None, stream_options={"include_usage": True})
    assert answer.meta["usage"]["completion_tokens"] == ask()[0].meta["usage"]["completion_tokens"]


@calls
def tools_auto():
    (answer,) = ask(tools=[TOOL])
    assert answer.text
    assert not answer.tool_calls


@calls.or_refused(openai.BadRequestError, "tool_choice")
def tool_choice():
    assert "city" in ask(tools=[TOOL], tool_choice="required")[0].tool_calls[0].arguments


@calls.or_refused(openai.BadRequestError, "response_format")
def json_schema():
    shape = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
    assert '"city"' in ask(response_format=shape, max_tokens=200)[0].text


@calls.or_refused(openai.NotFoundError, "unknown_route", "/v1/embeddings")
def embeddings():
    embedder = OpenAITextEmbedder(
        api_key=Secret.from_token(KEY), api_base_url=URL, model=MODEL, max_retries=0
    )
    assert embedder.run("a")["embedding"]


@calls
def wrong_model():
    with raises(openai.NotFoundError, "model_not_found"):
        ask(model="another")


@calls
def wrong_key():
    with raises(openai.AuthenticationError, "invalid_api_key"):
        ask(key="wrong")


@calls
def timeout():
    with raises(openai.APITimeoutError):
        ask(LONG, timeout=0.2, max_tokens=4000, temperature=1)
    chat()


@calls
def large_prompt():
    (answer,) = ask([ChatMessage.from_user(LARGE_PROMPT)])
    assert answer.meta["usage"]["prompt_tokens"] > 2000


@calls
def too_large():
    with raises(openai.BadRequestError, "context_length_exceeded"):
        ask([ChatMessage.from_user(TOO_LARGE_PROMPT)])


calls.run()
