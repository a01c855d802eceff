"""Its purpose is text that keeps to a type, pattern or grammar, asked for in OpenAI's or vLLM's fields."""

from __future__ import annotations

import asyncio
import json
import re

import openai
import outlines
from calls import KEY, MODEL, QUESTION, TIMEOUT_S, URL, Calls, raises
from outlines.exceptions import AuthenticationError, BadRequestError, NotFoundError
from outlines.types import Regex
from pydantic import BaseModel

OPTIONS = {"base_url": URL, "api_key": KEY, "max_retries": 0, "timeout": TIMEOUT_S}
calls = Calls("outlines")
GREEDY = {"temperature": 0, "max_tokens": 24}


class City(BaseModel):
    city: str
    inhabitants: int


def model(name=MODEL, **options):
    return outlines.from_openai(openai.OpenAI(**OPTIONS | options), name)


def vllm():
    return outlines.from_vllm(openai.OpenAI(**OPTIONS), MODEL)


@calls
def chat():
    assert model()(QUESTION, **GREEDY) == vllm()(QUESTION, **GREEDY) != ""


@calls
def stream():
    assert "".join(vllm().stream(QUESTION, **GREEDY)) == vllm()(QUESTION, **GREEDY)


@calls
def async_():
    async def three():
        one = outlines.from_vllm(openai.AsyncOpenAI(**OPTIONS), MODEL)
        return await asyncio.gather(*(one(QUESTION, **GREEDY) for _ in range(3)))

    assert set(asyncio.run(three())) == {vllm()(QUESTION, **GREEDY)}


@calls
def n():
    assert len(set(model()("Once upon a time", n=3, seed=1, max_tokens=24, temperature=1))) == 3


@calls.or_refused(BadRequestError, "response_format")
def json_schema():
    answer = json.loads(model()(QUESTION, City, temperature=0, max_tokens=200))
    assert isinstance(answer["inhabitants"], int)


@calls.or_refused(BadRequestError, "structured_outputs")
def constraint():
    assert re.fullmatch("[0-9]{4}", vllm()("In what year?", Regex("[0-9]{4}"), temperature=0))


@calls
def wrong_model():
    with raises(NotFoundError, "model_not_found"):
        model("another")(QUESTION)


@calls
def wrong_key():
    with raises(AuthenticationError, "invalid_api_key"):
        model(api_key="wrong")(QUESTION)


calls.run()
