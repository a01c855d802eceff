"""Its purpose is answers as objects, which it asks for in several ways (its modes)."""

from __future__ import annotations

import instructor
import openai
from calls import KEY, LONG_TASK, MODEL, QUESTION, TIMEOUT_S, URL, Calls, raises
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel

calls = Calls("instructor")
ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_retries": 0,
    "max_tokens": 200,
}


class City(BaseModel):
    city: str
    inhabitants: int


def client(mode=instructor.Mode.JSON_SCHEMA, **options):
    inner = openai.OpenAI(
        **{"base_url": URL, "api_key": KEY, "max_retries": 0, "timeout": TIMEOUT_S, **options}
    )
    return instructor.from_openai(inner, mode=mode)


@calls
def chat():
    """Without an object to fill it hands on the text."""
    answer = client().create(**ASKED, response_model=None)
    assert answer.choices[0].message.content


@calls
def stream():
    chunks = client().create(**ASKED, response_model=None, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == client().create(**ASKED, response_model=None).choices[0].message.content


@calls.or_refused((InstructorRetryException, openai.BadRequestError), "tool_choice")
def tool_choice():
    answer = client(instructor.Mode.TOOLS).create(**ASKED, response_model=City)
    assert isinstance(answer.inhabitants, int)


@calls.or_refused((InstructorRetryException, openai.BadRequestError), "response_format")
def json_schema():
    for mode in (instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
        answer = client(mode).create(**ASKED, response_model=City)
        assert isinstance(answer.inhabitants, int)


@calls
def wrong_model():
    with raises((InstructorRetryException, openai.NotFoundError), "model_not_found"):
        client().create(**ASKED | {"model": "another"}, response_model=None)


@calls
def wrong_key():
    with raises((InstructorRetryException, openai.AuthenticationError), "invalid_api_key"):
        client(api_key="wrong").create(**ASKED, response_model=City)


@calls
def timeout():
    task = {"messages": [{"role": "user", "content": LONG_TASK}], "max_tokens": 4000}
    with raises((InstructorRetryException, openai.APITimeoutError)):
        client(timeout=0.2).create(**ASKED | task, response_model=None)
    chat()


calls.run()
