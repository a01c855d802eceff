"""What the two generating routes share: ignored fields, the log's fields, and delivery."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.responses import Response

from server import logs
from server.delivery import ClientLeft, EventStream, collect, json_response, unless_client_leaves
from server.exchange import exchange_of
from server.middleware import call_of
from server.wire.body import ignored_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starlette.requests import Request

    from server.service import Service
    from server.streams import Delta, Generation
    from server.wire.fields import GenerationFields

MAX_IGNORED_CHARS = 400
MAX_LOOP_ANSWER_TOKENS = 256  # with 20 alternatives each, a few milliseconds
CLIENT_LEFT = Response(status_code=499)  # nobody reads it


def tenant_of(request: Request, body: GenerationFields) -> str:
    """The name of the API key; without keys what the client says."""
    tenant: str | None = getattr(request.state, "tenant", None)
    return tenant if tenant is not None else body.user or ""


def name_ignored(request: Request, service: Service, body: GenerationFields) -> dict[str, str]:
    """The header that names fields which mean nothing here, and one log line."""
    names = ignored_fields(body)
    if body.priority is not None and service.config.engine.scheduler.policy != "priority":
        names = sorted([*names, "priority"])
    parts = {
        "stream_options": body.stream_options,
        "decoding": body.decoding,
        "decoding.lossy": body.decoding.lossy if body.decoding is not None else None,
    }
    for path, part in parts.items():
        if part is not None:
            names += [f"{path}.{name}" for name in ignored_fields(part)]
    if not names:
        return {}
    shown = logs.sanitise(",".join(names), MAX_IGNORED_CHARS)
    header = "".join(char if char.isascii() else "?" for char in shown)
    logs.log(logging.WARNING, "ignored fields", request=call_of(request).request_id, fields=header)
    return {"x-octavo-ignored-fields": header}


async def answer(
    request: Request,
    service: Service,
    generation: Generation,
    whole: Callable[[list[Delta]], object],
    headers: dict[str, str],
) -> Response:
    """Wait for the end, or for the client to leave. A large answer is put together in a worker thread."""
    exchange_of(request.scope).accept()
    try:
        folded = await unless_client_leaves(request.receive, collect(generation))
        num_tokens = generation.num_output_tokens + sum(map(len, generation.prompt_logprobs))
        if num_tokens <= MAX_LOOP_ANSWER_TOKENS:
            return json_response(whole(folded), headers | _limits(service, generation))
        response = await service.threads.run(lambda: json_response(whole(folded), headers))
        response.headers.update(_limits(service, generation))
        return response
    except ClientLeft:
        return CLIENT_LEFT
    finally:
        finish(request, service, generation)


def stream(
    request: Request,
    service: Service,
    generation: Generation,
    chunks_of: Callable[[Delta], Iterable[object]],
    last: Callable[[], Iterable[object]],
    headers: dict[str, str],
) -> Response:
    exchange_of(request.scope).accept()
    return EventStream(
        generation,
        chunks_of,
        last,
        release=lambda: finish(request, service, generation),
        keep_alive_s=service.config.server.sse_keep_alive_s,
        headers=headers | _limits(service, generation),
    )


def _limits(service: Service, generation: Generation) -> dict[str, str]:
    return service.admission.tenants.headers(generation.requests[0].tenant)


def finish(request: Request, service: Service, generation: Generation) -> None:
    """Free everything, and say in the request's log line what it was."""
    service.release(generation)
    call_of(request).fields |= {
        "id": generation.requests[0].request_id.rpartition("-")[0],
        "prompt_tokens": sum(len(piece.prompt_ids) for piece in generation.requests),
        "cached_tokens": generation.num_cached,
        "output_tokens": generation.num_output_tokens,
        "finish": generation.outcome,
    }
