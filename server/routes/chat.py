"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.delivery import lossy_of, usage_of
from server.errors import invalid
from server.logprobs import chat_logprobs, prompt_logprobs
from server.openapi import described
from server.routes.bodies import read_body
from server.routes.generation import chunk_usage, name_ignored, respond, tenant_of
from server.service import Job, Service, new_id
from server.wire.body import parse_body
from server.wire.requests import ChatRequest
from server.wire.responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Message,
    finish_of,
)
from server.wire.responses import Delta as WireDelta

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.config import ServerConfig
    from server.streams import Delta, Generation


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()
    limits = service.config.server

    def parse(raw: bytes) -> ChatRequest:
        body = parse_body(raw, ChatRequest, limits.max_json_depth)
        service.check(body)
        _check(body, limits)
        return body

    @router.post("/v1/chat/completions", **described(ChatRequest, ChatCompletion))
    async def create_chat_completion(request: Request) -> Response:
        body = await read_body(request, service, parse)
        headers = name_ignored(request, service, body)
        job = _job(service, tenant_of(request, body), body)
        return await respond(request, service, job, partial(ChatView, service, body), headers)

    return router


def _check(body: ChatRequest, limits: ServerConfig) -> None:
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
    if body.top_logprobs is not None and body.top_logprobs > limits.max_logprobs:
        message = f"top_logprobs is {body.top_logprobs}; at most {limits.max_logprobs} is taken."
        raise invalid(message, "top_logprobs")
    if _max_tokens(body) == 0:
        raise invalid("must be at least 1.", _max_tokens_param(body))


def _max_tokens_param(body: ChatRequest) -> str:
    return "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"


def _max_tokens(body: ChatRequest) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def _job(service: Service, tenant: str, body: ChatRequest) -> Job:
    return Job(
        id=new_id("chatcmpl"),
        tenant=tenant,
        body=body,
        num_prompts=1,
        num_choices=body.n or 1,
        read_prompts=lambda reader: [reader.read_chat(body)],
        renders=True,
        max_tokens=_max_tokens(body),
        default_max_tokens=service.defaults.max_new_tokens,
        max_tokens_param=_max_tokens_param(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )


@dataclass(slots=True)
class ChatView:
    """The deltas of one request as OpenAI's chat completions."""

    service: Service
    body: ChatRequest
    generation: Generation
    id: str = ""
    created_s: int = 0
    begun: set[int] = field(default_factory=set)  # choices that have said their role

    def __post_init__(self) -> None:
        self.id = self.generation.requests[0].request_id.rpartition("-")[0]
        self.created_s = int(time.time())

    def whole(self, folded: list[Delta]) -> ChatCompletion:
        completion = ChatCompletion(
            id=self.id,
            created=self.created_s,
            model=self.body.model or self.service.model_name,
            system_fingerprint=self.service.fingerprint,
            decoding=lossy_of(self.generation),
            choices=[self._choice(delta) for delta in folded],
            usage=usage_of(self.generation),
        )
        if self.body.return_token_ids:
            completion.prompt_token_ids = self._prompt_ids()
        if self.body.prompt_logprobs is not None:
            completion.prompt_logprobs = prompt_logprobs(
                self.service.tokenizer, self.generation.prompt_logprobs[0], self.body.prompt_logprobs
            )
        return completion

    def chunks_of(self, delta: Delta) -> Iterator[ChatChunk]:
        """The end is in a chunk of its own, with an empty delta: clients lose text that comes with it."""
        if delta.index not in self.begun:
            self.begun.add(delta.index)
            yield self._first_chunk(delta.index)
        shows_tokens = self.body.logprobs or self.body.return_token_ids
        if delta.text or (delta.pieces and (shows_tokens or delta.finish is None)):
            choice = ChunkChoice(
                index=delta.index,
                delta=WireDelta(content=delta.text or None),
                logprobs=self._logprobs(delta),
            )
            if self.body.return_token_ids:
                choice.token_ids = [piece.token for piece in delta.pieces]
            yield self._chunk([choice], **chunk_usage(self.body, self.generation))
        if delta.finish is not None:
            end = ChunkChoice(index=delta.index, delta=WireDelta(), stop_reason=delta.stop_reason)
            end.finish_reason, end.finish_cause = finish_of(delta.finish)
            yield self._chunk([end], **chunk_usage(self.body, self.generation))

    def last(self) -> Iterator[ChatChunk]:
        if chunk_usage(self.body, self.generation):
            yield self._chunk([], usage=usage_of(self.generation))

    def _first_chunk(self, index: int) -> ChatChunk:
        role = ChunkChoice(index=index, delta=WireDelta(role="assistant", content=""))
        chunk = self._chunk([role], **chunk_usage(self.body, self.generation))
        if self.body.return_token_ids:
            chunk.prompt_token_ids = self._prompt_ids()
        return chunk

    def _chunk(self, choices: list[ChunkChoice], **usage: Any) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            created=self.created_s,
            model=self.body.model or self.service.model_name,
            system_fingerprint=self.service.fingerprint,
            decoding=lossy_of(self.generation),
            choices=choices,
            **usage,
        )

    def _choice(self, delta: Delta) -> ChatChoice:
        word, cause = finish_of(delta.finish)
        assert word is not None, "a fold ends when every choice has"
        choice = ChatChoice(
            index=delta.index,
            message=Message(content=delta.text),
            logprobs=self._logprobs(delta),
            finish_reason=word,
            finish_cause=cause,
            stop_reason=delta.stop_reason,
        )
        if self.body.return_token_ids:
            choice.token_ids = [piece.token for piece in delta.pieces]
        return choice

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(
            self.service.tokenizer,
            delta.pieces,
            self.body.top_logprobs or 0,
            as_ids=self.body.return_tokens_as_token_ids or False,
        )

    def _prompt_ids(self) -> list[int]:
        return list(self.generation.requests[0].prompt_ids)
