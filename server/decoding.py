"""From a request's `decoding` field to what the engine is told: limits of this engine, then defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from engine.config import DRAFTERS
from scheduler.types import LossyAcceptance
from server.errors import invalid
from server.wire.decoding import DecodingFields

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.messages import Ready
    from server.wire.decoding import LossyFields

SPECULATIVE = "speculative"
AUTO = "auto"
# Which rule of acceptance has which parameters.
PARAMETERS = {"typical": ("epsilon", "delta"), "threshold": ("threshold",)}


class Decoding(TypedDict):
    """Fields of `Request`."""

    method: str
    drafter: str
    max_draft_tokens: int
    lossy: LossyAcceptance | None


def decoding_of(asked: DecodingFields | None, engine: EngineConfig, ready: Ready | None) -> Decoding:
    """Raises the 400 for what contradicts itself, and for a drafter that the engine does not have."""
    asked = asked or DecodingFields()
    method = asked.method or engine.decoding
    if asked.drafter is not None:
        _check_drafter(asked.drafter, ready)
    if asked.lossy is not None and method != SPECULATIVE:
        message = f'decoding.lossy is about drafts: it needs the method "{SPECULATIVE}".'
        raise invalid(message, "decoding.lossy")
    return Decoding(
        method=method,
        drafter=asked.drafter or engine.drafter,
        max_draft_tokens=asked.max_draft_tokens or engine.max_draft_tokens,
        lossy=None if asked.lossy is None else _lossy(asked.lossy),
    )


def _check_drafter(name: str, ready: Ready | None) -> None:
    if name not in DRAFTERS:
        raise invalid(f"decoding.drafter must be one of {', '.join(DRAFTERS)}.", "decoding.drafter")
    if ready is None or name in (AUTO, *ready.drafters):
        return
    there = ", ".join((AUTO, *ready.drafters))
    message = f"decoding.drafter: {name} is not loaded; there are {there}. The setting draft_model adds more."
    raise invalid(message, "decoding.drafter")


def _lossy(asked: LossyFields) -> LossyAcceptance:
    given = asked.model_dump(include={"epsilon", "delta", "threshold"}, exclude_none=True)
    for name in given:
        if name not in PARAMETERS[asked.acceptance]:
            param = f"decoding.lossy.{name}"
            raise invalid(f'{param} means nothing to the acceptance "{asked.acceptance}".', param)
    return LossyAcceptance(rule=asked.acceptance, **given)
