from __future__ import annotations

import asyncio

import openai
from calls import (
    ANSWER,
    KEY,
    LARGE_PROMPT,
    LONG_TASK,
    MODEL,
    QUESTION,
    SYSTEM,
    TIMEOUT_S,
    TOO_LARGE_PROMPT,
    URL,
    Calls,
    raises,
)
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

calls = Calls("pydantic-ai-slim")


class City(BaseModel):
    city: str
    inhabitants: int


def provider(**options):
    inner = openai.AsyncOpenAI(
        **{"base_url": URL, "api_key": KEY, "max_retries": 0, "timeout": TIMEOUT_S, **options}
    )
    return OpenAIProvider(openai_client=inner)


def agent(name=MODEL, output=str, settings=None, model=OpenAIChatModel, **options):
    return Agent(
        model(name, provider=provider(**options)),
        output_type=output,
        system_prompt=SYSTEM,
        model_settings={"max_tokens": 24, "temperature": 0, **(settings or {})},
        retries=0,
    )


@calls
def chat():
    result = agent().run_sync(QUESTION)
    assert ANSWER in result.output
    assert result.usage.output_tokens > 0


@calls
def stream():
    async def text():
        async with agent().run_stream(QUESTION) as result:
            return "".join([piece async for piece in result.stream_text(delta=True)])

    assert asyncio.run(text()) == agent().run_sync(QUESTION).output


@calls
def async_():
    async def three():
        one = agent()
        return await asyncio.gather(*(one.run(QUESTION) for _ in range(3)))

    assert {result.output for result in asyncio.run(three())} == {agent().run_sync(QUESTION).output}


@calls
def logprobs():
    result = agent(settings={"openai_logprobs": True, "openai_top_logprobs": 3}).run_sync(QUESTION)
    tokens = result.all_messages()[-1].provider_details["logprobs"]
    assert all(len(token["top_logprobs"]) == 3 for token in tokens)


@calls
def stop():
    assert agent(settings={"stop_sequences": [" is"]}).run_sync(QUESTION).output == "The capital of France"


@calls
def seed():
    texts = [
        agent(settings={"seed": seed, "temperature": 1}).run_sync(LONG_TASK).output for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@calls
def stream_usage():
    async def counted():
        async with agent().run_stream(QUESTION) as result:
            await result.get_output()
            return result.usage.output_tokens

    assert asyncio.run(counted()) == agent().run_sync(QUESTION).usage.output_tokens


@calls
def tools_auto():
    asked = agent()

    @asked.tool_plain
    def get_weather(city: str) -> str:
        return f"It rains in {city}."

    assert asked.run_sync(QUESTION).output


@calls.or_refused(ModelHTTPError, "tool_choice")
def tool_choice():
    result = agent(output=ToolOutput(City), settings={"max_tokens": 200}).run_sync(QUESTION)
    assert isinstance(result.output.inhabitants, int)


@calls.or_refused(ModelHTTPError, "response_format")
def json_schema():
    result = agent(output=NativeOutput(City), settings={"max_tokens": 200}).run_sync(QUESTION)
    assert isinstance(result.output.inhabitants, int)


@calls.or_refused(ModelHTTPError, "structured_outputs")
def constraint():
    settings = {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}
    assert agent(settings=settings).run_sync(QUESTION).output in ("yes", "no")


@calls.or_refused(ModelHTTPError, "unknown_route", "/v1/responses")
def responses():
    assert agent(model=OpenAIResponsesModel).run_sync(QUESTION).output


@calls
def wrong_model():
    with raises(ModelHTTPError, "model_not_found"):
        agent("another").run_sync(QUESTION)


@calls
def wrong_key():
    with raises(ModelHTTPError, "invalid_api_key"):
        agent(api_key="wrong").run_sync(QUESTION)


@calls
def timeout():
    with raises(ModelAPIError):
        agent(settings={"timeout": 0.2, "max_tokens": 4000}).run_sync(LONG_TASK)
    chat()


@calls
def disconnect():
    async def leave():
        asked = agent(settings={"max_tokens": 4000, "temperature": 1})
        async with asked.run_stream(LONG_TASK) as result:
            async for _ in result.stream_text(delta=True, debounce_by=None):
                break

    asyncio.run(leave())
    chat()


@calls
def large_prompt():
    assert agent().run_sync(LARGE_PROMPT).usage.input_tokens > 2000


@calls
def too_large():
    with raises(ModelHTTPError, "context_length_exceeded"):
        agent().run_sync(TOO_LARGE_PROMPT)


calls.cannot(completions="chats alone", n="takes one choice", messages="not this model's interface")
calls.run()
