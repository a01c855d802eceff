from __future__ import annotations

import asyncio

from calls import ANSWER, KEY, LARGE_PROMPT, LONG_TASK, MODEL, QUESTION, SYSTEM, TIMEOUT_S, URL, Calls, raises
from openai import AsyncOpenAI
from pydantic import BaseModel
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory
from semantic_kernel.exceptions import ServiceResponseException
from semantic_kernel.functions import kernel_function

calls = Calls("semantic-kernel")


class City(BaseModel):
    city: str
    inhabitants: int


class Weather:
    @kernel_function(description="The weather in a city.")
    def get_weather(self, city: str) -> str:
        return f"It rains in {city}."


def service(name=MODEL, **options):
    inner = AsyncOpenAI(
        **{"base_url": URL, "api_key": KEY, "max_retries": 0, "timeout": TIMEOUT_S, **options}
    )
    return OpenAIChatCompletion(ai_model_id=name, async_client=inner)


def settings(**changes):
    return OpenAIChatPromptExecutionSettings(**{"max_tokens": 24, "temperature": 0, **changes})


def history(question=QUESTION):
    chat = ChatHistory(system_message=SYSTEM)
    chat.add_user_message(question)
    return chat


def ask(question=QUESTION, of=None, kernel=None, **changes):
    options = {"kernel": kernel} if kernel else {}
    return asyncio.run(
        (of or service()).get_chat_message_contents(history(question), settings(**changes), **options)
    )


def with_weather(choice):
    kernel = Kernel()
    kernel.add_plugin(Weather(), "city")
    return {"kernel": kernel, "function_choice_behavior": choice}


@calls
def chat():
    (answer,) = ask()
    assert ANSWER in answer.content
    assert answer.metadata["usage"].completion_tokens > 0


@calls
def stream():
    async def text():
        pieces = service().get_streaming_chat_message_contents(history(), settings())
        return "".join([str(piece) async for batch in pieces for piece in batch])

    assert asyncio.run(text()) == ask()[0].content


@calls
def async_():
    async def three():
        one = service()
        return await asyncio.gather(*(one.get_chat_message_contents(history(), settings()) for _ in range(3)))

    assert {answer.content for (answer,) in asyncio.run(three())} == {ask()[0].content}


@calls
def n():
    assert (
        len({answer.content for answer in ask(LONG_TASK, number_of_responses=3, seed=1, temperature=1)}) == 3
    )


@calls
def stop():
    assert ask(stop=[" is"])[0].content == "The capital of France"


@calls
def seed():
    texts = [ask(LONG_TASK, seed=seed, temperature=1)[0].content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@calls
def tools_auto():
    (answer,) = ask(**with_weather(FunctionChoiceBehavior.Auto()))
    assert answer.content


@calls.or_refused(ServiceResponseException, "tool_choice")
def tool_choice():
    (answer,) = ask(**with_weather(FunctionChoiceBehavior.Required(auto_invoke=False)))
    assert answer.items


@calls.or_refused(ServiceResponseException, "response_format")
def json_schema():
    (answer,) = ask(response_format=City, max_tokens=200)
    assert isinstance(City.model_validate_json(answer.content).inhabitants, int)


@calls
def wrong_model():
    with raises(ServiceResponseException, "model_not_found"):
        ask(of=service("another"))


@calls
def wrong_key():
    with raises(ServiceResponseException, "invalid_api_key"):
        ask(of=service(api_key="wrong"))


@calls
def timeout():
    with raises(ServiceResponseException, "Timeout"):
        ask(LONG_TASK, of=service(timeout=0.2), max_tokens=4000, temperature=1)
    chat()


@calls
def large_prompt():
    assert ask(LARGE_PROMPT)[0].metadata["usage"].prompt_tokens > 2000


calls.run()
