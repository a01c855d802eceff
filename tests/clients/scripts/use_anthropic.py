"""Anthropic's interface is not served: what its client makes of that."""

from __future__ import annotations

import anthropic
from calls import KEY, MODEL, QUESTION, TIMEOUT_S, URL, Calls, raises

OPTIONS = {"base_url": URL.removesuffix("/v1"), "auth_token": KEY, "max_retries": 0, "timeout": TIMEOUT_S}
client = anthropic.Anthropic(**OPTIONS)
calls = Calls("anthropic")


@calls.or_refused(anthropic.NotFoundError, "unknown_route", "/v1/messages")
def messages():
    answer = client.messages.create(
        model=MODEL, max_tokens=24, messages=[{"role": "user", "content": QUESTION}]
    )
    assert answer.content[0].text


@calls
def models():
    """The list has OpenAI's shape, whose fields this client passes on."""
    assert MODEL in [model.id for model in client.models.list()]


@calls
def wrong_key():
    with raises(anthropic.AuthenticationError, "invalid_api_key"):
        anthropic.Anthropic(**OPTIONS | {"auth_token": "wrong"}).models.list()


calls.run()
