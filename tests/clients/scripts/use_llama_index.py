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
    WEATHER_TOOL,
    Calls,
    raises,
)
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

MESSAGES = [ChatMessage(role="system", content=SYSTEM), ChatMessage(role="user", content=QUESTION)]
LONG = [ChatMessage(role="user", content=LONG_TASK)]
calls = Calls("llama-index-llms-openai-like")


class City(BaseModel):
    city: str
    inhabitants: int


def llm(temperature=0.0, chat=True, **options):
    return OpenAILike(
        **{
            "model": MODEL, "api_base": URL, "api_key": KEY, "is_chat_model": chat, "max_tokens": 24,
            "temperature": temperature, "max_retries": 0, "timeout": TIMEOUT_S,
            "context_window": 8192, **options,
        }
    )  # fmt: skip


@calls
def chat():
    answer = llm().chat(MESSAGES)
    assert ANSWER in answer.message.content
    assert answer.raw.usage.completion_tokens > 0


@calls
def stream():
    text = "".join(piece.delta for piece in llm().stream_chat(MESSAGES))
    assert text == llm().chat(MESSAGES).message.content


@calls
def async_():
    async def three():
        model = llm()
        whole = await asyncio.gather(model.achat(MESSAGES), model.achat(MESSAGES))
        streamed = "".join([piece.delta async for piece in await model.astream_chat(MESSAGES)])
        return {streamed, *(answer.message.content for answer in whole)}

    assert asyncio.run(three()) == {llm().chat(MESSAGES).message.content}


@calls
def completions():
    assert ANSWER in llm(chat=False, max_tokens=4).complete("The capital of France is").text
    pieces = llm(chat=False, max_tokens=4).stream_complete("The capital of France is")
    assert ANSWER in "".join(piece.delta for piece in pieces)


@calls
def logprobs():
    answer = llm(logprobs=True, top_logprobs=3).chat(MESSAGES)
    assert all(len(alternatives) == 3 for alternatives in answer.logprobs)


@calls
def n():
    answer = llm(temperature=1, additional_kwargs={"n": 3, "seed": 1}).chat(LONG)
    assert len({choice.message.content for choice in answer.raw.choices}) == 3


@calls
def stop():
    assert llm().chat(MESSAGES, stop=[" is"]).message.content == "The capital of France"


@calls
def seed():
    texts = [llm(temperature=1).chat(LONG, seed=seed).message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@calls
def stream_usage():
    pieces = list(llm().stream_chat(MESSAGES, stream_options={"include_usage": True}))
    counted = [piece.raw.usage for piece in pieces if piece.raw.usage]
    assert counted[-1].completion_tokens == llm().chat(MESSAGES).raw.usage.completion_tokens


@calls
def tools_auto():
    tool = FunctionTool.from_defaults(lambda city: city, name="get_weather", description="The weather.")
    model = llm(is_function_calling_model=True)
    answer = model.chat_with_tools([tool], user_msg=QUESTION)
    assert answer.message.content
    assert not model.get_tool_calls_from_response(answer, error_on_no_tool_call=False)


@calls.or_refused(openai.BadRequestError, "tool_choice")
def tool_choice():
    answer = llm(is_function_calling_model=True).chat(MESSAGES, tools=[WEATHER_TOOL], tool_choice="required")
    assert answer.message.additional_kwargs["tool_calls"]


@calls.or_refused(openai.BadRequestError, "response_format")
def json_schema():
    model = llm(should_use_structured_outputs=True, max_tokens=200).as_structured_llm(City)
    assert isinstance(model.chat(MESSAGES).raw.inhabitants, int)


@calls.or_refused(openai.BadRequestError, "structured_outputs")
def constraint():
    body = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert llm().chat(MESSAGES, extra_body=body).message.content in ("yes", "no")


@calls
def wrong_model():
    with raises(openai.NotFoundError, "model_not_found"):
        llm(model="another").chat(MESSAGES)


@calls
def wrong_key():
    with raises(openai.AuthenticationError, "invalid_api_key"):
        llm(api_key="wrong").chat(MESSAGES)


@calls
def timeout():
    with raises(openai.APITimeoutError):
        llm(timeout=0.2, max_tokens=4000, temperature=1).chat(LONG)
    chat()


@calls
def disconnect():
    stream = llm(max_tokens=4000, temperature=1).stream_chat(LONG)
    next(stream)
    stream.close()
    chat()


@calls
def large_prompt():
    answer = llm().chat([ChatMessage(role="user", content=LARGE_PROMPT)])
    assert answer.raw.usage.prompt_tokens > 2000


@calls
def too_large():
    with raises(openai.BadRequestError, "context_length_exceeded"):
        llm().chat([ChatMessage(role="user", content=TOO_LARGE_PROMPT)])


calls.cannot(
    messages="not its interface",
    responses="not in this package",
    embeddings="not in this package",
    models="lists no models",
)
calls.run()
