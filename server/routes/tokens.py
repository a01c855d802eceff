"""POST /tokenize and /detokenize: text to ids and back, without the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.delivery import json_response
from server.errors import invalid
from server.logprobs import token_text
from server.openapi import described
from server.prompt_reader import check_token_ids
from server.wire.body import read_body
from server.wire.requests import DetokenizeRequest, TokenizeRequest
from server.wire.responses import Text, Tokens

if TYPE_CHECKING:
    from server.service import Service


def tokens_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", **described(TokenizeRequest, Tokens))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeRequest)
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("Give either prompt or messages.", "prompt")
        ids = await service.in_thread(lambda: service.prompt_reader().read_tokenize(body))
        answer = Tokens(count=len(ids), max_model_len=service.max_model_len, tokens=ids)
        if body.return_token_strs:
            answer.token_strs = [token_text(service.tokenizer, token) for token in ids]
        return json_response(answer)

    @router.post("/detokenize", **described(DetokenizeRequest, Text))
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest)
        service.check_model(body.model)
        if len(body.tokens) > service.config.server.max_tokenize_chars:
            raise invalid("tokens: too many ids.", "tokens")
        check_token_ids(body.tokens, service.tokenizer.vocab_size, "tokens")
        decode = service.tokenizer.decode
        return json_response(
            Text(prompt=await service.in_thread(lambda: decode(body.tokens, skip_special=False)))
        )

    return router
