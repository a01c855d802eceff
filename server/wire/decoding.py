"""How a request wants to be decoded: an extension, beside OpenAI's fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.wire.body import WireModel


class DecodingFields(WireModel):
    """`drafter` and `max_draft_tokens` mean something with "speculative" alone. None: as configured."""

    method: Literal["autoregressive", "speculative"] | None = None
    drafter: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    max_draft_tokens: Annotated[int, Field(ge=1, le=1024)] | None = None
    report: bool | None = None  # acceptance in the usage block
