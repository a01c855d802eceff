"""How answers leave: as a stream of server-sent events or as a fold over the same deltas.

Both end their generation when the client does: a cancelled task closes it, and its pages are free
within the engine's next step.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import UNSET, UnsetType
from starlette.responses import Response

from server.errors import INTERNAL, ApiError
from server.exchange import exchange_of
from server.logs import logger
from server.streams import Delta
from server.wire.responses import CachedTokens, LossyDecoding, PredictedTokens, Usage, encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable

    from starlette.types import Receive, Scope, Send

    from server.streams import Generation

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class ClientLeft(Exception):
    """The client closed its connection; there is nobody to answer."""


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client disconnects. Raises ClientLeft."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientLeft
        return worker.result()
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(generation: Generation) -> list[Delta]:
    """All deltas of each choice folded into one, by index. Raises ApiError."""
    folded = [Delta(reader.index) for reader in generation.readers]
    texts: list[list[str]] = [[] for _ in folded]
    async for deltas in generation.deltas(keep=True):
        for delta in deltas:
            whole = folded[delta.index]
            texts[delta.index].append(delta.text)
            whole.pieces += delta.pieces
            whole.finish, whole.stop_reason = delta.finish, delta.stop_reason
    for whole, parts in zip(folded, texts, strict=True):
        whole.text = "".join(parts)
    return folded


class EventStream(Response):
    """Server-sent events. `render` makes the chunks of some deltas, `last` what follows the final ones."""

    def __init__(
        self,
        generation: Generation,
        chunks_of: Callable[[Delta], Iterable[object]],
        last: Callable[[], Iterable[object]],
        *,
        release: Callable[[], None],
        keep_alive_s: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(headers=STREAM_HEADERS | headers)
        del self.headers["content-length"]
        self._generation, self._chunks_of, self._last = generation, chunks_of, last
        self._release, self._keep_alive_s = release, keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._generation.when_too_much = exchange_of(scope).reset_if_unread
        try:
            with suppress(ClientLeft):
                await unless_client_leaves(receive, self._send_all(send))
        finally:
            self._release()

    async def _send_all(self, send: Send) -> None:
        """The status waits for the first event or comment: what fails before it is answered with its own.
        Raises ApiError then."""
        events = self._events()
        first = await anext(events, b"")
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        async for data in events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": DONE})

    async def _events(self) -> AsyncIterator[bytes]:
        """Bytes to send, [DONE] not included. An error after the first ones becomes an event."""
        begun = False
        try:
            async for deltas in self._generation.deltas(self._keep_alive_s):
                data = b"".join(map(event, (chunk for delta in deltas for chunk in self._chunks_of(delta))))
                if data or not deltas:
                    begun = True
                    yield data or KEEP_ALIVE
            for chunk in self._last():
                yield event(chunk)
        except Exception as error:
            if not begun:
                raise
            yield event(_envelope(error))


def _envelope(error: Exception) -> object:
    if isinstance(error, ApiError):
        return error.envelope()
    logger.error("stream failed", exc_info=error)
    return INTERNAL.envelope()


def event(chunk: object) -> bytes:
    return b"data: " + encode(chunk) + b"\n\n"


def usage_of(generation: Generation) -> Usage:
    """Tokens of the whole HTTP request; a prompt that n choices share counts once."""
    prompt = sum(len(request.prompt_ids) for request in generation.requests)
    output = generation.num_output_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=prompt + output,
        prompt_tokens_details=CachedTokens(cached_tokens=generation.num_cached),
        completion_tokens_details=_predicted(generation),
    )


def _predicted(generation: Generation) -> PredictedTokens | UnsetType:
    """When asked for, and always where drafts may have changed the text."""
    lossy = generation.requests[0].lossy
    if lossy is None and not generation.reports_drafts:
        return UNSET
    return PredictedTokens(
        accepted_prediction_tokens=generation.num_accepted,
        rejected_prediction_tokens=generation.num_drafts - generation.num_accepted,
        lossy=UNSET if lossy is None else lossy.rule,
    )


def lossy_of(generation: Generation) -> LossyDecoding | UnsetType:
    """What every answer and chunk says of its decoding: that it is lossy."""
    request = generation.requests[0]
    return UNSET if request.lossy is None else LossyDecoding(method=request.method, lossy=request.lossy.rule)


def json_response(body: object, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), headers=headers, media_type="application/json")
