from __future__ import annotations

import asyncio

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
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

OPTIONS = {
    "base_url": URL,
    "api_key": KEY,
    "model": MODEL,
    "max_retries": 0,
    "timeout": TIMEOUT_S,
    "max_tokens": 24,
}
MESSAGES = [("system", SYSTEM), ("human", QUESTION)]
calls = Calls("langchain-openai")


def greedy(**options):
    return ChatOpenAI(**{**OPTIONS, "temperature": 0, **options})


def warm(**options):
    return ChatOpenAI(**{**OPTIONS, "temperature": 1, **options})


@calls
def chat():
    answer = greedy().invoke(MESSAGES)
    assert ANSWER in answer.content
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata["output_tokens"] > 0


@calls
def stream():
    text = "".join(chunk.content for chunk in greedy().stream(MESSAGES))
    assert text == greedy().invoke(MESSAGES).content


@calls
def async_():
    async def three():
        model = greedy()
        whole = await asyncio.gather(model.ainvoke(MESSAGES), model.ainvoke(MESSAGES))
        streamed = "".join([chunk.content async for chunk in model.astream(MESSAGES)])
        return {streamed, *(answer.content for answer in whole)}

    assert asyncio.run(three()) == {greedy().invoke(MESSAGES).content}


@calls
def completions():
    prompts = ["The capital of France is", "One two three four"]
    texts = OpenAI(**OPTIONS | {"max_tokens": 4, "temperature": 0}).generate(prompts).generations
    assert ANSWER in texts[0][0].text
    assert texts[1][0].text


@calls
def logprobs():
    answer = greedy().bind(logprobs=True, top_logprobs=3).invoke(MESSAGES)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).startswith(answer.content)
    assert all(len(token["top_logprobs"]) == 3 for token in tokens)


@calls
def n():
    (choices,) = warm(n=3, seed=1).generate([[HumanMessage(LONG_TASK)]]).generations
    assert len({choice.text for choice in choices}) == 3


@calls
def stop():
    text = greedy().bind(stop=[" is"]).invoke(MESSAGES).content
    assert text == "The capital of France"


@calls
def seed():
    texts = [warm(seed=seed).invoke(LONG_TASK).content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@calls
def stream_usage():
    chunks = list(greedy(stream_usage=True).stream(MESSAGES))
    counted = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert counted[-1]["output_tokens"] == greedy().invoke(MESSAGES).usage_metadata["output_tokens"]


@calls
def tools_auto():
    answer = greedy().bind_tools([WEATHER_TOOL]).invoke(MESSAGES)
    assert answer.content
    assert answer.tool_calls == []


@calls.or_refused(openai.BadRequestError, "tool_choice")
def tool_choice():
    for choice in ("any", "get_weather"):
        answer = greedy().bind_tools([WEATHER_TOOL], tool_choice=choice).invoke(MESSAGES)
        assert "city" in answer.tool_calls[0]["args"]


@calls.or_refused(openai.BadRequestError, "response_format")
def json_schema():
    model = greedy(max_tokens=200).with_structured_output(
        {"title": "city", **CITY_SCHEMA}, method="json_schema"
    )
    assert isinstance(model.invoke(MESSAGES)["inhabitants"], int)


@calls.or_refused(openai.BadRequestError, "structured_outputs")
def constraint():
    model = greedy(extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert model.invoke(MESSAGES).content in ("yes", "no")


@calls.or_refused(openai.NotFoundError, "unknown_route", "/v1/embeddings")
def embeddings():
    model = OpenAIEmbeddings(base_url=URL, api_key=KEY, model=MODEL, check_embedding_ctx_length=False)
    assert model.embed_query("a")


@calls.or_refused(openai.NotFoundError, "unknown_route", "/v1/responses")
def responses():
    assert greedy(use_responses_api=True).invoke(MESSAGES).text


@calls
def wrong_model():
    with raises(openai.NotFoundError, "model_not_found"):
        greedy(model="another").invoke(MESSAGES)


@calls
def wrong_key():
    with raises(openai.AuthenticationError, "invalid_api_key"):
        greedy(api_key="wrong").invoke(MESSAGES)


@calls
def timeout():
    with raises(openai.APITimeoutError):
        warm(timeout=0.2, max_tokens=4000).invoke(LONG_TASK)
    chat()


@calls
def disconnect():
    stream = warm(max_tokens=4000).stream(LONG_TASK)
    next(stream)
    stream.close()
    chat()


@calls
def large_prompt():
    assert greedy().invoke(LARGE_PROMPT).usage_metadata["input_tokens"] > 2000


@calls
def too_large():
    with raises(openai.BadRequestError, "context_length_exceeded"):
        greedy().invoke(TOO_LARGE_PROMPT)


calls.cannot(messages="not its interface", models="lists no models")
calls.run()
