"""Reading a body: small ones on the event loop, large ones in a worker thread."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from server.wire.body import check_content_type

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from server.service import Service

T = TypeVar("T")

MAX_LOOP_BODY_BYTES = 2**16  # parsing and checking this much takes a millisecond or two


async def read_body(request: Request, service: Service, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of the body. It must not touch what belongs to the loop. Raises ApiError."""
    check_content_type(request)
    raw = await request.body()
    if len(raw) <= MAX_LOOP_BODY_BYTES:
        return parse(raw)
    return await service.threads.run_bounded(partial(parse, raw))
