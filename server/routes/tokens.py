"""POST /tokenize and /detokenize: text to ids and back, without the engine, all in worker threads; and
GET /tokenizer_info."""

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
from server.routes.bodies import read_body
from server.wire.body import parse_body, parse_object, validate
from server.wire.requests import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from server.wire.responses import Text, TokenizerInfo, Tokens

if TYPE_CHECKING:
    from server.service import Service


def tokens_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", **described((TokenizeTextRequest, TokenizeChatRequest), Tokens))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, service, partial(_to_tokenize, service), max_loop_bytes=-1)
        threads = service.rendering if isinstance(body, TokenizeChatRequest) else service.threads
        return await threads.run_bounded(partial(_tokenize, service, body))

    @router.post("/detokenize", **described(DetokenizeRequest, Text))
    async def detokenize(request: Request) -> Response:
        return await read_body(request, service, partial(_detokenize, service), max_loop_bytes=-1)

    @router.get("/tokenizer_info", **described(None, TokenizerInfo))
    async def tokenizer_info() -> Response:
        """What lm-eval's remote tokeniser reads, beside /tokenize and /detokenize."""
        special, tokenizer = service.checkpoint.special_tokens, service.tokenizer
        return json_response(
            TokenizerInfo(
                bos_token=special.get("bos_token"),
                eos_token=special.get("eos_token"),
                pad_token=special.get("pad_token"),
                unk_token=special.get("unk_token"),
                add_bos_token=tokenizer.add_bos,
                chat_template=service.template.source if service.template is not None else None,
                model_max_length=service.max_model_len,
                vocab_size=tokenizer.vocab_size,
            )
        )

    return router


def _to_tokenize(service: Service, raw: bytes) -> TokenizeChatRequest | TokenizeTextRequest:
    value = parse_object(raw, service.config.server.max_json_depth)
    body: TokenizeChatRequest | TokenizeTextRequest
    if value.get("messages") is None:
        body = validate(value, TokenizeTextRequest)
    else:
        body = validate(value, TokenizeChatRequest)
    service.check_model(body.model)
    return body


def _tokenize(service: Service, body: TokenizeChatRequest | TokenizeTextRequest) -> Response:
    reader = service.prompt_reader()
    ids = reader.tokenize_chat(body) if isinstance(body, TokenizeChatRequest) else reader.tokenize_text(body)
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
