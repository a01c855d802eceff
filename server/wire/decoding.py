"""How a request wants to be decoded: an extension, beside OpenAI's fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.wire.body import WireModel

Share = Annotated[float, Field(gt=0, le=1)]


class LossyFields(WireModel):
    """`epsilon` and `delta` are of "typical", `threshold` of "threshold". None: as usual for it."""

    acceptance: Literal["typical", "threshold"]
    epsilon: Share | None = None
    delta: Share | None = None
    threshold: Share | None = None


class DecodingFields(WireModel):
    """All but `method` mean something with "speculative" alone. None: as configured."""

    method: Literal["autoregressive", "speculative"] | None = None
    drafter: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    max_draft_tokens: Annotated[int, Field(ge=1, le=1024)] | None = None
    lossy: LossyFields | None = None  # drafts may stand that the model would not have drawn
    report: bool | None = None  # acceptance in the usage block
