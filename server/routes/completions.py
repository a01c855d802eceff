"""POST /v1/completions."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.delivery import lossy_of, usage_of
from server.detokenizer import IncrementalDetokenizer
from server.errors import invalid
from server.logprobs import joined, legacy_logprobs, prompt_logprobs
from server.openapi import described
from server.prompt_reader import split_prompts
from server.routes.bodies import read_body
from server.routes.generation import chunk_usage, name_ignored, respond, tenant_of
from server.service import Job, Service, new_id
from server.streams import Delta, Generation, Piece
from server.wire.body import parse_body
from server.wire.requests import CompletionRequest
from server.wire.responses import Completion, CompletionChoice, LegacyLogprobs, finish_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.prompt_reader import Prompt, PromptReader, RawPrompt

DEFAULT_MAX_TOKENS = 16


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()
    limits = service.config.server

    def parse(raw: bytes) -> tuple[CompletionRequest, list[RawPrompt]]:
        body = parse_body(raw, CompletionRequest, limits.max_json_depth)
        service.check(body)
        _check(body, limits.max_logprobs, limits.max_choices)
        return body, split_prompts(body.prompt, limits.max_prompts)

    @router.post("/v1/completions", **described(CompletionRequest, Completion))
    async def create_completion(request: Request) -> Response:
        body, raw = await read_body(request, service, parse)
        headers = name_ignored(request, service, body)
        prompts: list[Prompt] = []
        job = _job(tenant_of(request, body), body, raw, prompts)
        view_of = partial(CompletionView, service, body, prompts)
        return await respond(request, service, job, view_of, headers)

    return router


def _check(body: CompletionRequest, max_logprobs: int, max_choices: int) -> None:
    if body.logprobs is not None and body.logprobs > max_logprobs:
        raise invalid(f"logprobs is {body.logprobs}; at most {max_logprobs} is taken.", "logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens must be at least 1, unless echo asks to score the prompt.", "max_tokens")
    if body.best_of is None:
        return
    if body.best_of > max_choices:
        raise invalid(f"best_of is {body.best_of}; at most {max_choices} is taken.", "best_of")
    if body.best_of < (body.n or 1):
        raise invalid(f"best_of ({body.best_of}) is smaller than n ({body.n}).", "best_of")
    if body.stream and body.best_of != (body.n or 1):
        raise invalid("best_of cannot be streamed, unless it equals n.", "best_of")


def _job(tenant: str, body: CompletionRequest, raw: list[RawPrompt], prompts: list[Prompt]) -> Job:
    """`prompts` is filled while the prompts are read."""

    def read_prompts(reader: PromptReader) -> list[Prompt]:
        add_special = body.add_special_tokens is not False
        for number, item in enumerate(raw):
            param = "prompt" if len(raw) == 1 else f"prompt.{number}"
            prompts.append(reader.read(item, param, add_special=add_special))
        return prompts

    ranked = body.best_of is not None and body.best_of > (body.n or 1)
    wanted = [
        count for count in (body.prompt_logprobs, body.logprobs if body.echo else None) if count is not None
    ]
    return Job(
        id=new_id("cmpl"),
        tenant=tenant,
        body=body,
        num_prompts=len(raw),
        num_choices=body.best_of or body.n or 1,
        read_prompts=read_prompts,
        max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        max_tokens_param="max_tokens",
        logprobs=0 if ranked and body.logprobs is None else body.logprobs,
        prompt_logprobs=max(wanted, default=None),
        discard_output=body.max_tokens == 0,
    )


@dataclass(slots=True)
class CompletionView:
    """The deltas of one request as OpenAI's text completions."""

    service: Service
    body: CompletionRequest
    prompts: list[Prompt]
    generation: Generation
    id: str = ""
    created_s: int = 0
    echoes: dict[int, str] = field(default_factory=dict)  # by prompt, so that n choices decode it once
    begun: set[int] = field(default_factory=set)  # choices whose first chunk is out

    def __post_init__(self) -> None:
        self.id = self.generation.requests[0].request_id.rpartition("-")[0]
        self.created_s = int(time.time())

    def whole(self, folded: list[Delta]) -> Completion:
        choices = []
        for index, delta in enumerate(self._best(folded)):
            choice = self._finished(self._choice(delta, first=True), delta)
            choice.index = index
            choices.append(choice)
        return self._completion(choices, usage=usage_of(self.generation))

    def chunks_of(self, delta: Delta) -> Iterator[Completion]:
        """The end is in a chunk of its own: clients lose text that comes with it."""
        first = delta.index not in self.begun
        choice = self._choice(delta, first=first)
        shows_tokens = self.body.logprobs is not None or self.body.return_token_ids
        if choice.text or (delta.pieces and (shows_tokens or delta.finish is None)):
            self.begun.add(delta.index)
            yield self._completion([choice], **chunk_usage(self.body, self.generation))
        if delta.finish is not None:
            end = self._finished(CompletionChoice(index=delta.index, text=""), delta)
            yield self._completion([end], **chunk_usage(self.body, self.generation))

    def last(self) -> Iterator[Completion]:
        if chunk_usage(self.body, self.generation):
            yield self._completion([], usage=usage_of(self.generation))

    def _completion(self, choices: list[CompletionChoice], **usage: Any) -> Completion:
        return Completion(
            id=self.id,
            created=self.created_s,
            model=self.body.model or self.service.model_name,
            system_fingerprint=self.service.fingerprint,
            decoding=lossy_of(self.generation),
            choices=choices,
            **usage,
        )

    def _choice(self, delta: Delta, *, first: bool) -> CompletionChoice:
        number = delta.index // self.generation.num_choices
        echo = self._echo(number) if self.body.echo else ""
        choice = CompletionChoice(
            index=delta.index,
            text=echo + delta.text if first else delta.text,
        )
        if self.body.logprobs is not None:
            choice.logprobs = self._logprobs(number, delta, len(echo), first=first)
        if self.body.return_token_ids:
            choice.token_ids = [piece.token for piece in delta.pieces]
            if first:
                choice.prompt_token_ids = list(self.prompts[number].ids)
        if self.body.prompt_logprobs is not None and first:
            entries = self.generation.prompt_logprobs[number]
            choice.prompt_logprobs = prompt_logprobs(
                self.service.tokenizer, entries, self.body.prompt_logprobs
            )
        return choice

    def _finished(self, choice: CompletionChoice, delta: Delta) -> CompletionChoice:
        choice.finish_reason, choice.finish_cause = finish_of(delta.finish)
        choice.stop_reason = delta.stop_reason
        return choice

    def _logprobs(self, number: int, delta: Delta, echo_chars: int, *, first: bool) -> LegacyLogprobs:
        logprobs_of = partial(
            legacy_logprobs,
            self.service.tokenizer,
            num_top=self.body.logprobs or 0,
            as_ids=self.body.return_tokens_as_token_ids or False,
        )
        logprobs = logprobs_of(delta.pieces, base_offset=echo_chars)
        if not (self.body.echo and first):
            return logprobs
        return joined(logprobs_of(self._prompt_pieces(number), base_offset=0), logprobs)

    def _prompt_pieces(self, number: int) -> list[Piece]:
        """The prompt's tokens. What was put before the client's text (a BOS) starts at 0 with it."""
        ids = self.prompts[number].ids
        detokenizer = IncrementalDetokenizer(self.service.tokenizer, False)
        starts, chars = [], 0
        for token in ids:
            starts.append(chars)
            chars += len(detokenizer.push((token,)))
        shift = chars + len(detokenizer.flush()) - len(self._echo(number))
        entries = (None, *self.generation.prompt_logprobs[number])
        return [
            Piece(token, entry, max(0, start - shift))
            for token, start, entry in zip(ids, starts, entries, strict=False)
        ]

    def _echo(self, number: int) -> str:
        if number not in self.echoes:
            prompt = self.prompts[number]
            text = prompt.text
            if text is None:
                text = self.service.tokenizer.decode(list(prompt.ids), skip_special=False)
            self.echoes[number] = text
        return self.echoes[number]

    def _best(self, folded: list[Delta]) -> list[Delta]:
        """Of each prompt's best_of choices, the n with the highest mean log-probability."""
        kept, made = self.body.n or 1, self.generation.num_choices
        if kept == made:
            return folded
        groups = (folded[start : start + made] for start in range(0, len(folded), made))
        return [delta for group in groups for delta in sorted(group, key=_mean_logprob, reverse=True)[:kept]]


def _mean_logprob(delta: Delta) -> float:
    values = [piece.logprobs.logprob for piece in delta.pieces if piece.logprobs is not None]
    return sum(values) / len(values) if values else float("-inf")
