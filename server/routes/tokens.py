"""POST /tokenize and /detokenize: text to ids and back, without the engine, all in worker threads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.delivery import json_response
from server.errors import invalid
from server.logprobs import token_text
from server.openapi import described
from server.prompt_reader import check_token_ids
from server.wire.body import check_content_type, parse_body, parse_object, validate
from server.wire.requests import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from server.wire.responses import Text, Tokens

if TYPE_CHECKING:
    from server.service import Service


def tokens_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", **described((TokenizeTextRequest, TokenizeChatRequest), Tokens))
    async def tokenize(request: Request) -> Response:
        check_content_type(request)
        raw = await request.body()
        return await service.threads.run_bounded(partial(_tokenize, service, raw))

    @router.post("/detokenize", **described(DetokenizeRequest, Text))
    async def detokenize(request: Request) -> Response:
        check_content_type(request)
        raw = await request.body()
        return await service.threads.run_bounded(partial(_detokenize, service, raw))

    return router


def _tokenize(service: Service, raw: bytes) -> Response:
    value = parse_object(raw, service.config.server.max_json_depth)
    reader = service.prompt_reader()
    body: TokenizeChatRequest | TokenizeTextRequest
    if value.get("messages") is not None:
        body = validate(value, TokenizeChatRequest)
        service.check_model(body.model)
        ids = reader.tokenize_chat(body)
    else:
        body = validate(value, TokenizeTextRequest)
        service.check_model(body.model)
        ids = reader.tokenize_text(body)
    answer = Tokens(count=len(ids), max_model_len=service.max_model_len, tokens=ids)
    if body.return_token_strs:
        answer.token_strs = [token_text(service.tokenizer, token) for token in ids]
    return json_response(answer)


def _detokenize(service: Service, raw: bytes) -> Response:
    limits = service.config.server
    body = parse_body(raw, DetokenizeRequest, limits.max_json_depth)
    service.check_model(body.model)
    if len(body.tokens) > limits.max_tokenize_chars:
        raise invalid("tokens: too many ids.", "tokens")
    check_token_ids(body.tokens, service.tokenizer.vocab_size, "tokens")
    return json_response(Text(prompt=service.tokenizer.decode(body.tokens, skip_special=False)))
