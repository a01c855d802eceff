from __future__ import annotations

import asyncio
import json

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

OPTIONS = {"base_url": URL, "api_key": KEY, "max_retries": 0, "timeout": TIMEOUT_S}
client = openai.OpenAI(**OPTIONS)
calls = Calls("openai")
GREEDY = {
    "model": MODEL,
    "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}],
    "max_tokens": 24,
    "temperature": 0,
}
WARM = {
    "model": MODEL,
    "messages": [{"role": "user", "content": LONG_TASK}],
    "max_tokens": 24,
    "temperature": 1,
}


def ask(**changes):
    return client.chat.completions.create(**{**GREEDY, **changes})


@calls
def chat():
    answer = ask()
    assert ANSWER in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 10


@calls
def stream():
    chunks = list(ask(stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask().choices[0].message.content
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]


@calls
def async_():
    async def three():
        async with openai.AsyncOpenAI(**OPTIONS) as other:
            return await asyncio.gather(*(other.chat.completions.create(**GREEDY) for _ in range(3)))

    assert {answer.choices[0].message.content for answer in asyncio.run(three())} == {
        ask().choices[0].message.content
    }


@calls
def completions():
    prompts = ["The capital of France is", "One two three four"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, temperature=0, echo=True)
    assert [
        choice.text[: len(prompt)] for choice, prompt in zip(answer.choices, prompts, strict=True)
    ] == prompts
    assert ANSWER in answer.choices[0].text


@calls
def logprobs():
    choice = ask(logprobs=True, top_logprobs=3).choices[0]
    # Behind the text comes the token that ended it.
    assert "".join(token.token for token in choice.logprobs.content).startswith(choice.message.content)
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(each.logprob for each in token.top_logprobs)
    of_completion = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=2, temperature=0, logprobs=2
    )
    assert [len(tops) for tops in of_completion.choices[0].logprobs.top_logprobs] == [2, 2]


@calls
def n():
    choices = client.chat.completions.create(**WARM, n=3, seed=1).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.message.content for choice in choices}) == 3


@calls
def stop():
    choice = client.completions.create(
        model=MODEL,
        prompt="one two three four five six one two three",
        max_tokens=24,
        temperature=0,
        stop=" six",
    ).choices[0]
    assert (choice.text, choice.finish_reason) == (" four five", "stop")


@calls
def seed():
    texts = [
        client.chat.completions.create(**WARM, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@calls
def stream_usage():
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == ask().usage.model_copy(update=dict(chunks[-1].usage))
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


@calls
def tools_auto():
    assert ask(tools=[WEATHER_TOOL]).choices[0].message.content
    assert ask(tools=[WEATHER_TOOL], tool_choice="auto").choices[0].message.content


@calls.or_refused(openai.BadRequestError, "tool_choice")
def tool_choice():
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        (call,) = ask(tools=[WEATHER_TOOL], tool_choice=choice).choices[0].message.tool_calls
        assert "city" in json.loads(call.function.arguments)


@calls.or_refused(openai.BadRequestError, "response_format")
def json_schema():
    shape = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
    answer = json.loads(ask(response_format=shape, max_tokens=200).choices[0].message.content)
    assert isinstance(answer["inhabitants"], int)


@calls.or_refused(openai.BadRequestError, "structured_outputs")
def constraint():
    body = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert ask(extra_body=body).choices[0].message.content in ("yes", "no")


@calls.or_refused(openai.NotFoundError, "unknown_route", "/v1/embeddings")
def embeddings():
    assert client.embeddings.create(model=MODEL, input="a").data[0].embedding


@calls.or_refused(openai.NotFoundError, "unknown_route", "/v1/responses")
def responses():
    assert client.responses.create(model=MODEL, input=QUESTION).output_text


@calls
def models():
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@calls
def wrong_model():
    with raises(openai.NotFoundError, "another", "model_not_found"):
        ask(model="another")


@calls
def wrong_key():
    with raises(openai.AuthenticationError, "invalid_api_key"):
        client.with_options(api_key="wrong").models.list()


@calls
def timeout():
    with raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(**{**WARM, "max_tokens": 4000})
    chat()


@calls
def disconnect():
    with client.chat.completions.create(**{**WARM, "max_tokens": 4000}, stream=True) as stream:
        next(iter(stream))
    chat()


@calls
def large_prompt():
    answer = ask(messages=[{"role": "user", "content": LARGE_PROMPT}])
    assert answer.usage.prompt_tokens > 2000
    assert answer.choices[0].message.content


@calls
def too_large():
    with raises(openai.BadRequestError, "context_length_exceeded"):
        ask(messages=[{"role": "user", "content": TOO_LARGE_PROMPT}])


calls.cannot(messages="not its interface")
calls.run()
