from __future__ import annotations

import asyncio
import json

import litellm
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

OPTIONS = {"api_base": URL, "api_key": KEY, "max_retries": 0, "timeout": TIMEOUT_S, "max_tokens": 24}
NAME = f"openai/{MODEL}"
GREEDY = {
    **OPTIONS,
    "model": NAME,
    "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}],
    "temperature": 0,
}
WARM = {
    **OPTIONS,
    "model": NAME,
    "messages": [{"role": "user", "content": LONG_TASK}],
    "temperature": 1,
}
calls = Calls("litellm")


def ask(**changes):
    return litellm.completion(**{**GREEDY, **changes})


@calls
def chat():
    answer = ask()
    assert ANSWER in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens > 0


@calls
def stream():
    text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))
    assert text == ask().choices[0].message.content


@calls
def async_():
    async def three():
        return await asyncio.gather(*(litellm.acompletion(**GREEDY) for _ in range(3)))

    texts = {answer.choices[0].message.content for answer in asyncio.run(three())}
    assert texts == {ask().choices[0].message.content}


@calls
def completions():
    prompt = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    answer = litellm.text_completion(**OPTIONS | prompt, model=f"text-completion-openai/{MODEL}")
    assert ANSWER in answer.choices[0].text


@calls
def logprobs():
    choice = ask(logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).startswith(choice.message.content)
    assert all(len(token.top_logprobs) == 3 for token in tokens)


@calls
def n():
    choices = litellm.completion(**WARM, n=3, seed=1).choices
    assert len({choice.message.content for choice in choices}) == 3


@calls
def stop():
    assert ask(stop=[" is"]).choices[0].message.content == "The capital of France"


@calls
def seed():
    texts = [litellm.completion(**WARM, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@calls
def stream_usage():
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    counted = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert counted[-1].completion_tokens == ask().usage.completion_tokens


@calls
def tools_auto():
    answer = ask(tools=[WEATHER_TOOL], tool_choice="auto").choices[0].message
    assert answer.content
    assert not answer.tool_calls


@calls.or_refused(litellm.BadRequestError, "tool_choice")
def tool_choice():
    (call,) = ask(tools=[WEATHER_TOOL], tool_choice="required").choices[0].message.tool_calls
    assert "city" in json.loads(call.function.arguments)


@calls.or_refused(litellm.BadRequestError, "response_format")
def json_schema():
    shape = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
    answer = json.loads(ask(response_format=shape, max_tokens=200).choices[0].message.content)
    assert isinstance(answer["inhabitants"], int)


@calls.or_refused(litellm.BadRequestError, "structured_outputs")
def constraint():
    answer = ask(extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert answer.choices[0].message.content in ("yes", "no")


@calls.or_refused(litellm.NotFoundError, "/v1/embeddings")
def embeddings():
    answer = litellm.embedding(model=NAME, input=["a"], api_base=URL, api_key=KEY, max_retries=0)
    assert answer.data[0]["embedding"]


@calls.or_refused(litellm.NotFoundError, "/v1/responses")
def responses():
    assert litellm.responses(model=NAME, input=QUESTION, api_base=URL, api_key=KEY).output


@calls
def models():
    assert MODEL in litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_base=URL, api_key=KEY
    )


@calls
def wrong_model():
    with raises(litellm.NotFoundError, "another"):
        ask(model="openai/another")


@calls
def wrong_key():
    with raises(litellm.AuthenticationError, "API key"):
        ask(api_key="wrong")


@calls
def timeout():
    with raises(litellm.Timeout):
        litellm.completion(**{**WARM, "timeout": 0.2, "max_tokens": 4000})
    chat()


@calls
def disconnect():
    next(iter(litellm.completion(**{**WARM, "max_tokens": 4000}, stream=True)))
    chat()


@calls
def large_prompt():
    answer = ask(messages=[{"role": "user", "content": LARGE_PROMPT}])
    assert answer.usage.prompt_tokens > 2000


@calls
def too_large():
    with raises(litellm.ContextWindowExceededError):
        ask(messages=[{"role": "user", "content": TOO_LARGE_PROMPT}])


calls.cannot(messages="sends chat completions to servers like OpenAI's")
calls.run()
