"""OpenAI's own SDK against the server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from scheduler.types import FinishReason
from tests.server.byte_tokenizer import EOS
from tests.server.fake_engine import FakeEngine, Live
from tests.server.http.conftest import MODEL, Running, running
from tests.server.http.test_disconnect import within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.messages import SequenceOutput

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def sdk(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completion(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model=MODEL, prompt="x", max_tokens=3, n=2, logprobs=1, stop=["zz"])
    assert [choice.text for choice in answer.choices] == ["abc", "bcd"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=9, stop="f", logprobs=True, top_logprobs=1
    )
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("abcde", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [entry.token for entry in choice.logprobs.content] == ["a", "b", "c", "d", "e"]


def test_streams(sdk: openai.OpenAI) -> None:
    usage = {"include_usage": True}
    text = ""
    last = None
    for chunk in sdk.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, stream=True, stream_options=usage
    ):
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        last = chunk
    assert text == "abcde"
    assert last is not None
    assert last.usage is not None
    assert last.usage.completion_tokens == 5
    pieces = sdk.completions.create(model=MODEL, prompt="x", max_tokens=5, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "abcde"


async def test_async_stream(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        stream = await sdk.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=4, n=2, stream=True
        )
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == ["abcd", "bcde"]


@dataclass
class CutOff(FakeEngine):
    """Ends every sequence after two tokens."""

    cause: FinishReason = FinishReason.DEADLINE

    def _advance(self, live: Live) -> SequenceOutput:
        return self._end(live, self.cause) if live.sent == 2 else super()._advance(live)


@pytest.mark.parametrize(
    ("engine", "word", "cause"),
    [
        (FakeEngine(), "length", None),
        (FakeEngine(reply=lambda request, index: [*b"ab", EOS]), "stop", None),
        (CutOff(), "length", "deadline"),
        (CutOff(cause=FinishReason.ABORT), "length", "abort"),
    ],
)
def test_how_a_choice_ends_is_a_word_that_the_sdk_knows(
    engine: FakeEngine, word: str, cause: str | None
) -> None:
    """Checked against the SDK's types, as strict clients do; the SDK itself takes anything."""
    with running(engine) as server:
        asked: dict[str, object] = {"messages": MESSAGES, "max_tokens": 3}
        chat = server.post("/v1/chat/completions", asked).json()
        ChatCompletion.model_validate(chat)
        text = server.complete(max_tokens=3)
        Completion.model_validate(text)
        ends = [chat["choices"][0], text["choices"][0]]
        bodies = {"/v1/chat/completions": asked, "/v1/completions": {"prompt": "x", "max_tokens": 3}}
        for path, body in bodies.items():
            blocks = server.post(path, {**body, "stream": True}).text.split("\n\n")[:-2]
            chunks = [json.loads(block.removeprefix("data: ")) for block in blocks]
            ends.append(chunks[-1]["choices"][0])
            if "messages" in body:  # of completions the SDK has no type for chunks
                for chunk in chunks:
                    ChatCompletionChunk.model_validate(chunk)
        assert [(end["finish_reason"], end.get("finish_cause")) for end in ends] == [(word, cause)] * 4
        reason = cause or word
        assert server.num_ended(reason) == 4


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]
    assert sdk.models.retrieve(MODEL).id == MODEL


def test_errors_are_typed(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.completions.create(model=MODEL, prompt="x", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(model="other", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with (
        running(api_keys=("k",)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="bad") as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


def test_leaving_a_stream_aborts_it() -> None:
    with (
        running(FakeEngine(step_s=0.01)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as sdk,
    ):
        stream = sdk.completions.create(model=MODEL, prompt="x", max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
        within(1, lambda: bool(server.engine.aborts) and not server.engine.live)
