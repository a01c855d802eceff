from __future__ import annotations

import openai
from calls import ANSWER, KEY, LARGE_PROMPT, LONG_TASK, MODEL, QUESTION, SYSTEM, TIMEOUT_S, URL, Calls, raises
from smolagents import ChatMessage, OpenAIServerModel, tool

MESSAGES = [
    ChatMessage(role="system", content=[{"type": "text", "text": SYSTEM}]),
    ChatMessage(role="user", content=[{"type": "text", "text": QUESTION}]),
]
calls = Calls("smolagents")


@tool
def get_weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: its name
    """
    return f"It rains in {city}."


def model(name=MODEL, key=KEY, temperature=0, max_tokens=24, timeout=TIMEOUT_S, **options):
    return OpenAIServerModel(
        name, api_base=URL, api_key=key, client_kwargs={"max_retries": 0, "timeout": timeout}, retry=False,
        temperature=temperature, max_tokens=max_tokens, **options,
    )  # fmt: skip


def long(text=LONG_TASK):
    return [ChatMessage(role="user", content=[{"type": "text", "text": text}])]


@calls
def chat():
    answer = model().generate(MESSAGES)
    assert ANSWER in answer.content
    assert answer.token_usage.output_tokens > 0


@calls
def stream():
    text = "".join(piece.content or "" for piece in model().generate_stream(MESSAGES))
    assert text == model().generate(MESSAGES).content


@calls
def stop():
    assert model().generate(MESSAGES, stop_sequences=[" is"]).content == "The capital of France"


@calls
def seed():
    texts = [model(temperature=1, seed=seed).generate(long()).content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@calls
def stream_usage():
    counted = [piece.token_usage for piece in model().generate_stream(MESSAGES) if piece.token_usage]
    assert counted[-1].output_tokens == model().generate(MESSAGES).token_usage.output_tokens


@calls
def tools_auto():
    answer = model(tool_choice="auto").generate(MESSAGES, tools_to_call_from=[get_weather])
    assert answer.content
    assert not answer.tool_calls


@calls.or_refused(openai.BadRequestError, "tool_choice")
def tool_choice():
    """What its agents of tools ask for by themselves."""
    assert model().generate(MESSAGES, tools_to_call_from=[get_weather]).tool_calls


@calls.or_refused(openai.BadRequestError, "response_format")
def json_schema():
    shape = {"type": "json_schema", "json_schema": {"name": "city", "schema": {"type": "object"}}}
    assert model(max_tokens=200).generate(MESSAGES, response_format=shape).content.startswith("{")


@calls
def wrong_model():
    with raises(openai.NotFoundError, "model_not_found"):
        model("another").generate(MESSAGES)


@calls
def wrong_key():
    with raises(openai.AuthenticationError, "invalid_api_key"):
        model(key="wrong").generate(MESSAGES)


@calls
def timeout():
    with raises(openai.APITimeoutError):
        model(timeout=0.2, max_tokens=4000, temperature=1).generate(long())
    chat()


@calls
def large_prompt():
    assert model().generate(long(LARGE_PROMPT)).token_usage.input_tokens > 2000


calls.run()
