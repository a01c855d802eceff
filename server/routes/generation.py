"""What the two generating routes share: ignored fields, the log's fields, and delivery."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from starlette.responses import Response

from server import logs
from server.delivery import (
    ClientLeft,
    EventStream,
    collect,
    json_response,
    unless_client_leaves,
    usage_of,
)
from server.exchange import exchange_of
from server.middleware import call_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starlette.requests import Request

    from server.service import Job, Service
    from server.streams import Delta, Generation
    from server.wire.fields import GenerationFields
    from server.wire.responses import Usage

MAX_LOOP_ANSWER_TOKENS = 256  # with 20 alternatives each, a few milliseconds
CLIENT_LEFT = Response(status_code=499)  # nobody reads it


def tenant_of(request: Request, body: GenerationFields) -> str:
    """The name of the API key; without keys what the client says."""
    tenant: str | None = getattr(request.state, "tenant", None)
    return tenant if tenant is not None else body.user or ""


def name_ignored(request: Request, service: Service, body: GenerationFields) -> dict[str, str]:
    """The header that names fields without effect, for whoever wonders."""
    names = list(body.ignored)
    if body.priority is not None and service.config.engine.scheduler.policy != "priority":
        names.append("priority")
    if not names:
        return {}
    shown = ",".join(sorted(names))
    logs.log(logging.DEBUG, "ignored fields", request=call_of(request).request_id, fields=shown)
    return {"x-octavo-ignored-fields": shown}


def chunk_usage(body: GenerationFields, generation: Generation) -> dict[str, Usage | None]:
    """What each chunk of a stream says of usage; null announces a chunk of its own at the end."""
    options = body.stream_options
    if options is None or not options.include_usage:
        return {}
    return {"usage": usage_of(generation) if options.continuous_usage_stats else None}


class View(Protocol):
    """How a route shows a generation: as chunks of a stream and what ends them, or as a whole."""

    def chunks_of(self, delta: Delta) -> Iterable[object]: ...

    def last(self) -> Iterable[object]: ...

    def whole(self, folded: list[Delta]) -> object: ...


async def respond(
    request: Request,
    service: Service,
    job: Job,
    view_of: Callable[[Generation], View],
    headers: dict[str, str],
) -> Response:
    """Have it computed; whatever happens from there on, it is finished."""
    generation = await service.generate(job)
    with ExitStack() as cleanup:
        cleanup.callback(_finish, request, service, generation)
        exchange_of(request.scope).accept()
        view = view_of(generation)
        if not job.body.stream:
            return await _answer(request, service, generation, view, headers)
        stream = EventStream(
            generation,
            view.chunks_of,
            view.last,
            release=lambda: _finish(request, service, generation),
            keep_alive_s=service.config.server.sse_keep_alive_s,
            headers=headers | _limits(service, generation),
        )
        cleanup.pop_all()  # from here on it is the stream's
        return stream


async def _answer(
    request: Request, service: Service, generation: Generation, view: View, headers: dict[str, str]
) -> Response:
    """Wait for the end, or for the client to leave. A large answer is put together in a worker thread."""
    try:
        folded = await unless_client_leaves(request.receive, collect(generation))
    except ClientLeft:
        return CLIENT_LEFT
    num_tokens = generation.num_output_tokens + sum(map(len, generation.prompt_logprobs))
    if num_tokens <= MAX_LOOP_ANSWER_TOKENS:
        return json_response(view.whole(folded), headers | _limits(service, generation))
    response = await service.threads.run(lambda: json_response(view.whole(folded), headers))
    response.headers.update(_limits(service, generation))
    return response


def _limits(service: Service, generation: Generation) -> dict[str, str]:
    return service.admission.tenants.headers(generation.requests[0].tenant)


def _finish(request: Request, service: Service, generation: Generation) -> None:
    """Free everything, and say in the request's log line what it was."""
    service.release(generation)
    call_of(request).fields |= {
        "id": generation.requests[0].request_id.rpartition("-")[0],
        "prompt_tokens": sum(len(piece.prompt_ids) for piece in generation.requests),
        "cached_tokens": generation.num_cached,
        "output_tokens": generation.num_output_tokens,
        "finish": generation.outcome,
    }
